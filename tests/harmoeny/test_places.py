"""Device, link and host of a rank: predicted ends by an event simulation, choices against exhaustive search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.cost import ExpertCost
from harmoeny.places import PlaceCosts, choose_host, places_end_s, places_s, spare_copies
from tests.strategies import examples

COST = ExpertCost(
    token_s=2.0, fetch_s=9.0, launch_s=1.0, weights_s=3.0, host_token_s=5.0, host_launch_s=0.5, host_weights_s=8.0,
    host_trip_s=1.5,
)  # fmt: skip


@st.composite
def machines(draw: st.DrawFn) -> ExpertCost:
    return ExpertCost(
        token_s=draw(st.floats(0.01, 3.0)),
        fetch_s=draw(st.floats(0.1, 30.0)),
        launch_s=draw(st.sampled_from([0.0, 0.5])),
        weights_s=draw(st.floats(0.0, 5.0)),
        host_token_s=draw(st.floats(0.01, 10.0)),
        host_launch_s=draw(st.sampled_from([0.0, 0.3])),
        host_weights_s=draw(st.floats(0.0, 20.0)),
        host_trip_s=draw(st.floats(0.0, 3.0)),
    )


def ranks_experts(most: int) -> st.SearchStrategy[list[tuple[int, bool]]]:
    """Tokens of every expert, and whether it is held."""
    return st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=most)


def end_s(experts: list[tuple[int, bool]], host: tuple[bool, ...], cost: ExpertCost) -> float:
    """Play three timelines: the device runs what it holds, then fetched experts as they come; the host its own."""
    device = [n for (n, held), there in zip(experts, host, strict=True) if held and not there]
    fetched = sorted(
        (n for (n, held), there in zip(experts, host, strict=True) if not held and not there), reverse=True
    )
    arrivals = [(0.0, n) for n in device] + [(cost.fetch_s * (i + 1), n) for i, n in enumerate(fetched)]
    now = 0.0
    for arrival, n in arrivals:
        now = max(now, arrival) + cost.launch_s + max(n * cost.token_s, cost.weights_s)
    return max(now, cost.host_s([n for (n, _), there in zip(experts, host, strict=True) if there]))


def best_s(experts: list[tuple[int, bool]], cost: ExpertCost) -> float:
    return min(end_s(experts, host, cost) for host in product((False, True), repeat=len(experts)))


@examples(300)
@given(experts=ranks_experts(8), cost=machines(), data=st.data())
def test_the_predicted_end_is_that_of_the_three_timelines(
    experts: list[tuple[int, bool]], cost: ExpertCost, data: st.DataObject
) -> None:
    experts = sorted(experts, key=lambda e: -e[0])
    host = tuple(data.draw(st.booleans()) for _ in experts)
    tokens, held = np.array([n for n, _ in experts]), np.array([h for _, h in experts])
    predicted = places_end_s(tokens, held, np.array(host), PlaceCosts.of(cost))
    assert predicted == pytest.approx(end_s(experts, host, cost))


@examples(400)
@given(experts=ranks_experts(6), cost=machines())
def test_choices_of_a_few_are_those_of_exhaustive_search(experts: list[tuple[int, bool]], cost: ExpertCost) -> None:
    """By the end and a fortieth of a fetch for each, which is why the end alone may be later by that."""
    experts = sorted(experts, key=lambda e: -e[0])
    tokens, held = np.array([n for n, _ in experts]), np.array([h for _, h in experts])
    costs = PlaceCosts.of(cost)

    def judged_s(host: tuple[bool, ...]) -> float:
        num_fetches = sum(not h and not there for (_, h), there in zip(experts, host, strict=True))
        return end_s(experts, host, cost) + 0.025 * cost.fetch_s * num_fetches

    host = tuple(choose_host(tokens[:, None], held[:, None], costs)[:, 0].tolist())
    assert places_s(tokens, held, np.array(host), costs) == pytest.approx(judged_s(host))
    every = product((False, True), repeat=len(experts))
    assert judged_s(host) == pytest.approx(min(judged_s(other) for other in every))
    assert end_s(experts, host, cost) <= 1.1 * best_s(experts, cost) * (1 + 1e-9)


def test_on_average_choices_are_within_two_percent_of_the_best() -> None:
    rng, ratios = np.random.default_rng(5), []
    for _ in range(60):
        experts = [(int(n), bool(h)) for n, h in zip(rng.integers(1, 40, 9), rng.random(9) < 0.4, strict=True)]
        times = rng.uniform(0.05, 1.0, 6)
        cost = ExpertCost(
            token_s=times[0], fetch_s=20 * times[1], weights_s=4 * times[2], host_token_s=5 * times[3],
            host_weights_s=15 * times[4], host_trip_s=times[5],
        )  # fmt: skip
        executed, resident = np.array([[n] for n, _ in experts]), np.array([[h] for _, h in experts])
        host = choose_host(executed, resident, PlaceCosts.of(cost))[:, 0]
        ratios.append(end_s(experts, tuple(host.tolist()), cost) / best_s(experts, cost))
    assert np.mean(ratios) < 1.02


def test_a_host_without_costs_executes_nothing_and_ranks_are_apart() -> None:
    executed, resident = np.full((5, 2), 4), np.zeros((5, 2), np.bool_)
    unknown = PlaceCosts.of(ExpertCost(token_s=1.0, fetch_s=1e9))
    assert not choose_host(executed, resident, unknown).any()
    resident[:, 1] = True
    host = choose_host(executed, resident, PlaceCosts.of(ExpertCost(token_s=1.0, fetch_s=1e9, host_token_s=1e3)))
    assert host[:, 0].all()
    assert not host[:, 1].any()


def test_the_link_brings_as_many_experts_as_there_is_time_for() -> None:
    """Three held experts of 7 s each: 21 s are 2.33 fetches of 9 s; another on the host takes 22, fetched until 28."""
    executed, held = np.full((4, 1), 3), np.array([[True], [True], [True], [False]])
    host, costs = np.zeros((4, 1), np.bool_), PlaceCosts.of(COST)

    def copies(num_batches: int, idle: float) -> int:
        found = (spare_copies(executed, held, host, costs, np.array([idle]), batch) for batch in range(num_batches))
        return sum(int(copies[0]) for copies in found)

    executed[3] = 0
    assert copies(60, idle=1.0) == 140
    assert copies(60, idle=0.5) == 70, "half of the other layers fetch"
    assert copies(60, idle=0.6 / 2.333) == 60, "most of one"
    assert copies(60, idle=0.45 / 2.333) == 27
    executed[3] = 3
    assert copies(60, idle=0.0) == 120, "two beside each fetch"
    executed[:3] = 0
    assert copies(60, idle=1.0) == 0, "a fetch, and the expert's 7 s"
    executed[:3] = 3
    executed[3], host[3] = 4, True
    assert copies(36, idle=1.0) == 88
