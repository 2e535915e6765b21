"""From the command line to checked points, and one point as Hydra's task."""
