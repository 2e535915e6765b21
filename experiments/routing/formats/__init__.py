"""Routing that other software records: one module per recorder's format; docs/traces.md says how to record each."""
