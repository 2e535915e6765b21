"""What model adapters share."""
