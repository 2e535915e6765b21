"""Times that schedules reckon with, against sums made by hand."""

from __future__ import annotations

import numpy as np

from harmoeny.cost import ExpertCost

COST = ExpertCost(
    token_s=1.0, fetch_s=9.0, exchange_token_s=10.0, peer_fetch_s=31.0, exchange_latency_s=1.0, copy_token_s=0.5
)


def test_rows_are_there_when_the_busiest_rank_has_sent_or_received_all_of_its() -> None:
    traffic = np.array([[6, 4], [3, 1]])  # rank 0 sends 4 and receives 3
    # Picking 10 rows, an exchange of 4, and ordering what the rank received.
    assert COST.head_s(traffic, 0) == (5.0 + (1.0 + 40.0) + 4.5, 0.0)
    assert COST.head_s(traffic, 1) == (5.0 + (1.0 + 40.0) + 2.5, 0.0)
    own = np.diag(traffic.diagonal())
    assert COST.head_s(traffic, 1, own) == (5.0, (1.0 + 40.0) + 2.5), "own rows need no exchange"
    first = np.array([[2, 1], [0, 1]])
    assert COST.head_s(traffic, 1, first) == (5.0 + (1.0 + 10.0) + 1.0, 30.0 + 1.5), "the others follow"
