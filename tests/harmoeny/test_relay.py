"""Trees of weights: against the least number of rounds, against links simulated apart, and invariants of who sends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.simulator.topology import Topology
from harmoeny.cost import NO_LINKS, Links
from harmoeny.hardware import Hardware
from harmoeny.held import with_free
from harmoeny.placement import Placement, place
from harmoeny.plan import Plan
from harmoeny.predict import Costs, Sources
from harmoeny.relay import num_hops, relayed_s
from harmoeny.sources import choose_sources
from harmoeny.wire import nodes
from tests.harmoeny.test_balance import COSTS
from tests.strategies import examples

#: An expert takes 7 s between ranks, and never so long that the host is faster.
SLOW_HOST = COSTS._replace(fetch_s=1e6, relays=1.0)


def sources(
    wanted: np.ndarray, placement: Placement, costs: Costs, links: Links = NO_LINKS, *, halve: bool = False
) -> Sources:
    """Choose where ranks that want an expert get it; ``wanted``: bool ``[num_experts, world_size]``."""
    shares = np.ascontiguousarray(wanted.T.astype(np.int64))
    free = np.full(placement.world_size, placement.num_experts)
    return choose_sources(
        shares, shares, placement.home, placement.resident, with_free(free, placement.resident), costs, links, halve
    )


@pytest.mark.parametrize("receivers", range(3, 16))
def test_one_expert_is_everywhere_after_as_many_rounds_as_it_takes_to_double(receivers: int) -> None:
    placement, wanted = place("contiguous", 1, receivers + 1), np.ones((1, receivers + 1), np.bool_)
    found = sources(wanted, placement, SLOW_HOST)
    rounds = receivers.bit_length()
    assert 7 * rounds < found.ready_s.max() <= (7 + 1) * rounds, "with a second of latency where it is handed on"
    assert 1 < num_hops(found.from_peer, found.senders, placement.home).max() <= rounds
    direct = sources(wanted, placement, SLOW_HOST._replace(relays=0.0))
    assert direct.ready_s.max() == 7.0 * receivers + 1
    assert direct.senders.size == 0


@examples(80)
@given(
    st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**32 - 1),
    st.sampled_from(["switch", "nodes", "links"]), st.sampled_from([1e6, 30.0, 8.0]),
)  # fmt: skip
def test_whoever_sends_has_the_expert_and_links_carry_one_after_the_other(
    world_size: int, num_experts: int, seed: int, kind: str, fetch_s: float
) -> None:
    """The plan's prediction is what the simulator makes of the links, which it knows by itself."""
    rng, expert_bytes = np.random.default_rng(seed), 80.0
    hardware = Hardware(all_to_all_bytes_per_s=20.0, all_to_all_latency_s=0.5)
    costs = SLOW_HOST._replace(peer_fetch_s=0.5 + 4.0, exchange_latency_s=0.5, fetch_s=fetch_s)
    if kind == "nodes":
        hardware = Hardware(
            all_to_all_bytes_per_s=20.0, all_to_all_latency_s=0.5, ranks_per_node=3, network_bytes_per_s=5.0
        )
        costs = costs._replace(node_ranks=3.0, network_share=4.0)
    elif kind == "links":
        rates = rng.choice([4.0, 10.0, 40.0], (world_size, world_size)) * (1 - np.eye(world_size))
        hardware = Hardware(peer_bytes_per_s=rates.tolist(), all_to_all_latency_s=0.5)
    topology = Topology(hardware, world_size)
    links = topology.links(expert_bytes)
    placement = Placement.from_home(rng.integers(0, world_size, num_experts), world_size)
    found = sources(rng.random((num_experts, world_size)) < 0.5, placement, costs, links, halve=True)
    if found.senders.size == 0:
        return
    halved = found.halved if found.halved.size else None
    tokens = np.zeros((world_size, num_experts, world_size), np.int64)
    tokens[0] = found.from_peer
    plan = Plan(tokens, found.from_peer.copy(), found.from_peer, senders=found.senders, halved=halved)
    plan.validate(tokens.sum(axis=2), placement)
    predicted_s = relayed_s(found.senders, found.halved, placement.home, nodes(world_size, costs), costs, links)
    np.testing.assert_allclose(predicted_s, topology.handed_on_s(expert_bytes, found.senders, placement.home, halved))
    if fetch_s == SLOW_HOST.fetch_s:
        assert halved is None, "half of it would be later than all from another rank"
        np.testing.assert_allclose(found.ready_s, predicted_s)
    assert (found.ready_s >= predicted_s - 1e-9).all()


def test_the_last_receiver_gets_half_from_either_source_where_that_is_soonest() -> None:
    """A latency of 1 s, 6 s per expert, 10 s from the host: 1 + 2 * 6, 10, or the later of 1 + 6 + 3 and 5."""
    placement, wanted = place("contiguous", 1, 3), np.ones((1, 3), np.bool_)
    costs = COSTS._replace(peer_fetch_s=7.0, exchange_latency_s=1.0, fetch_s=12.0)
    whole = sources(wanted, placement, costs)
    assert whole.from_peer.tolist() == [[False, True, False]]
    assert whole.ready_s.tolist() == [0.0, 7.0, 12.0]
    found = sources(wanted, placement, costs, halve=True)
    assert found.from_peer.tolist() == [[False, True, True]]
    assert found.halved.tolist() == [[False, False, True]]
    # In one exchange, every rank is through when its sender is: after 9 s of sending.
    assert found.ready_s.tolist() == [0.0, 10.0, 10.0]
    assert found.host_link_s.tolist() == [0.0, 0.0, 6.0]
    # Only a latency later where ranks hand weights on; those that do get all of it.
    relayed = sources(np.ones((1, 4), np.bool_), place("contiguous", 1, 4), costs._replace(relays=1.0), halve=True)
    assert relayed.halved.tolist() == [[False, False, False, True]]


def test_half_is_brought_by_neither_source_where_one_is_far_sooner() -> None:
    placement, wanted = place("contiguous", 1, 3), np.ones((1, 3), np.bool_)
    for costs in (COSTS._replace(fetch_s=1e3), COSTS._replace(fetch_s=0.1), COSTS._replace(peer_fetch_s=0.0)):
        assert sources(wanted, placement, costs, halve=True).halved.size == 0


@pytest.mark.parametrize(
    ("halved", "senders", "message"),
    [
        ([[False, True]], None, "shape"),
        ([[True, False, False]], None, "sent by no peer"),
        ([[False, True, False]], [[-1, 0, 1]], "handed on by who has half"),
        ([[False, False, True]], [[-1, 0, 1]], None),
        ([[False, True, True]], [[-1, 0, 0]], None),
    ],
)
def test_a_plan_with_other_halves_is_refused(
    halved: list[list[bool]], senders: list[list[int]] | None, message: str | None
) -> None:
    tokens = np.zeros((3, 1, 3), np.int64)
    tokens[0, 0, 1:] = 5
    placement, fetch = place("contiguous", 1, 3), np.array([[False, True, True]])
    given = None if senders is None else np.array(senders)
    plan = Plan(tokens, fetch, fetch, senders=given, halved=np.array(halved))
    if message is None:
        plan.validate(tokens.sum(axis=2), placement)
        return
    with pytest.raises(ValueError, match=f"plan.halved: {message}"):
        plan.validate(tokens.sum(axis=2), placement)


@pytest.mark.parametrize(
    ("senders", "message"),
    [([[-1, 0, -1]], "not those"), ([[-1, 2, 0]], "lacks the expert"), ([[-1, 0, 1]], None), ([[-1, 1, 0]], "lacks")],
)
def test_a_plan_with_other_senders_is_refused(senders: list[list[int]], message: str | None) -> None:
    tokens = np.zeros((3, 1, 3), np.int64)
    tokens[0, 0, 1:] = 5
    placement = place("contiguous", 1, 3)
    fetch = np.array([[False, True, True]])
    plan = Plan(tokens, fetch, fetch, senders=np.array(senders))
    if message is None:
        plan.validate(tokens.sum(axis=2), placement)
        return
    with pytest.raises(ValueError, match=f"plan.senders: {message}"):
        plan.validate(tokens.sum(axis=2), placement)
