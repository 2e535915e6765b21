"""From documents to the tokens that the ranks read."""
