"""Tools around the experiments: thin, each with --help."""
