"""One MoE layer on all ranks, phase by phase, and the record of it."""
