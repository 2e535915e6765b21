"""Benchmarks of the parts that must not show up in a profile; run by `make bench`."""
