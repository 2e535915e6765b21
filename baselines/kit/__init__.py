"""What baselines are made of, and no policy itself."""
