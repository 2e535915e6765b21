"""GPU-NDP: its assignment against exhaustive search and by hand, and what a prompt leaves in the slots."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given

from baselines.gpu_ndp import GpuNdp, assign_in_turn
from harmoeny.cost import ExpertCost
from harmoeny.places import PlaceCosts
from tests.baselines.test_cache import counts_of, follow
from tests.harmoeny.test_places import end_s, machines, ranks_experts
from tests.strategies import examples

#: Everything is left to the host, and nothing fetched.
HOST = ExpertCost(token_s=1.0, fetch_s=1e6, host_token_s=1e-3)


@examples(300)
@given(experts=ranks_experts(6), cost=machines())
def test_it_is_no_better_than_exhaustive_search_and_no_worse_than_either_side_alone(
    experts: list[tuple[int, bool]], cost: ExpertCost
) -> None:
    """In order of tokens; whoever takes an expert ends no later than the other would, which had more to do alone."""
    experts = sorted(experts, key=lambda e: -e[0])
    executed, resident = np.array([[n] for n, _ in experts]), np.array([[h] for _, h in experts])
    host = tuple(assign_in_turn(executed, resident, PlaceCosts.of(cost))[:, 0].tolist())
    times = {other: end_s(experts, other, cost) for other in product((False, True), repeat=len(experts))}
    assert times[host] >= min(times.values())
    assert times[host] <= cost.host_s([n for n, _ in experts]) * (1 + 1e-9)
    if resident.all():
        assert times[host] <= times[(False,) * len(experts)] * (1 + 1e-9)


def test_an_assignment_by_hand() -> None:
    """Tokens 8, 6, 4, 2; the third is held; a token takes 1 and 2, a fetch 5.

    8: there at 5, done at 13, or on the host by 16. 6: there at 10, done at 19, or by 12: host. 4: done at 17, or by
    20. 2: there at 10, done at 19, or by 16: host.
    """
    costs = PlaceCosts.of(ExpertCost(token_s=1.0, fetch_s=5.0, host_token_s=2.0))
    executed, resident = np.array([[8], [6], [4], [2]]), np.array([[False], [False], [True], [False]])
    assert assign_in_turn(executed, resident, costs)[:, 0].tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match="must be calibrated"):
        GpuNdp().on_host(executed, None)  # type: ignore[arg-type]


def test_a_prompt_fills_the_slots_until_the_next_one() -> None:
    first, second = counts_of(*[3] * 5, *[6] * 4, 1), counts_of(*[2] * 4, *[6] * 3, *[7] * 2)
    batches = [first, counts_of(0, 1), counts_of(4, 5), second, counts_of(0, 1)]
    held = follow(GpuNdp(num_slots=2).calibrated(HOST), batches)
    assert held == [[0, 1], [3, 6], [3, 6], [3, 6], [2, 6], [2, 6]]


def test_a_cap_leaves_the_other_slots_as_they_are() -> None:
    assert follow(GpuNdp(num_slots=3, cap=1).calibrated(HOST), [counts_of(5, 5, 6)])[-1] == [0, 1, 5]
    assert follow(GpuNdp(num_slots=3, cap=0).calibrated(HOST), [counts_of(5, 5, 6)])[-1] == [0, 1, 2]
    with pytest.raises(ValueError, match="cap: -1, must be at least 0, or null"):
        GpuNdp(cap=-1).validate()
