"""Figures: one file each, found by discovery; each says which results it needs."""
