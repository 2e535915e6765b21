"""One point of an experiment: its options, its checked form, its identity."""
