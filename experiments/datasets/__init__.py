"""Data sets: one file each, found by discovery."""
