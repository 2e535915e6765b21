"""Advice from a sweep of simulations: which system to use where, what it gains, and how sure that is."""
