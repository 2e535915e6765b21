"""What ranks send each other: collectives, dispatch and combine."""
