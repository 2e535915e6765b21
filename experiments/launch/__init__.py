"""Starting ranks on this machine, or joining ranks that something else started."""
