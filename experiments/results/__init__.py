"""What a run leaves in its folder, and who belongs to a sweep."""
