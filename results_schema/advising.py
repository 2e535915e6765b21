"""What experiments that end with advice need: one side refuses points without it, the other reads it."""

from __future__ import annotations

#: Experiments whose sweeps end with advice.
ADVISING = ("advise", "advise_here", "advise_serving")
#: The system that all others are compared with.
STATIC = "static_ep"
#: Rounds at the beginning in which nobody has seen a batch before: they count for nobody.
COLD_ROUNDS = 1
