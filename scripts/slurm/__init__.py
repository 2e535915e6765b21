"""Batch files for SLURM, and what they call."""
