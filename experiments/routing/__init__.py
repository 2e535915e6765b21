"""Recorded routing: written by runs, read back, and the one that the paper's authors published."""
