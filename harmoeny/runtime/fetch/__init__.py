"""Fetch strategies: how a rank gets at the weights of the experts that it executes. One file each, one interface."""
