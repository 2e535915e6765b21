"""Routers: where tokens go. One file each, found by discovery; all give every system the same choice of experts."""
