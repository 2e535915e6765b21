"""What figures share, and no figure itself."""
