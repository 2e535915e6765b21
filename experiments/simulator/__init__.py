"""The simulator: the same policies, routers and order of work as the real runtime, on machines only described."""
