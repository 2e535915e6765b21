from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.simulator.topology import Topology
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.predict import machine_costs
from harmoeny.sources import arrivals_s
from tests.strategies import examples

SWITCH = Hardware(all_to_all_bytes_per_s=10.0, host_link_bytes_per_s=4.0)
# A square without diagonals: 0 - 1 - 3 - 2 - 0.
SQUARE = Hardware(peer_bytes_per_s=[[0, 8, 4, 1], [8, 0, 1, 4], [4, 1, 0, 8], [1, 4, 8, 0]])


def sent(world_size: int, **pairs: float) -> np.ndarray:
    matrix = np.zeros((world_size, world_size))
    for pair, number in pairs.items():
        src, dst = pair[1:].split("_")
        matrix[int(src), int(dst)] = number
    return matrix


def test_one_rank_exchanges_nothing() -> None:
    assert Topology(Hardware(), 1).exchange_s(np.full((1, 1), 100.0)).tolist() == [0.0]


def test_two_ranks_wait_for_the_larger_direction() -> None:
    hardware = replace(SWITCH, all_to_all_latency_s=0.5)
    assert Topology(hardware, 2).exchange_s(sent(2, s0_1=20.0, s1_0=50.0)).tolist() == [5.5, 5.5]


def test_a_receiver_of_all_takes_as_long_as_its_own_link() -> None:
    times = Topology(SWITCH, 4).exchange_s(sent(4, s1_0=20.0, s2_0=20.0, s3_0=20.0))
    assert times.tolist() == [6.0] * 4


def test_a_rank_that_exchanges_nothing_is_ready_at_once() -> None:
    assert Topology(SWITCH, 3).exchange_s(sent(3, s0_1=20.0)).tolist() == [2.0, 2.0, 0.0]


def test_a_slow_link_is_avoided_over_two_ranks_in_proportion() -> None:
    # 0 -> 3 over 1 (slower link 4) and over 2 (slower link 4): half of 80 bytes over each link of 4 bytes/s.
    assert Topology(SQUARE, 4).exchange_s(sent(4, s0_3=80.0)).tolist() == [10.0, 0.0, 0.0, 10.0]
    # 0 -> 1 has the link 0-1 (8 bytes/s) for itself; 0 -> 3 puts another 40 bytes on it.
    times = Topology(SQUARE, 4).exchange_s(sent(4, s0_1=80.0, s0_3=80.0))
    assert times.tolist() == [15.0, 15.0, 0.0, 15.0]


def test_fewer_ranks_than_a_node_use_only_their_own_links() -> None:
    assert Topology(SQUARE, 2).exchange_s(sent(2, s0_1=80.0)).tolist() == [10.0, 10.0]


def test_one_sender_has_links_for_itself_that_an_all_to_all_shares() -> None:
    switch = Topology(replace(SWITCH, all_to_all_latency_s=0.5), 4)
    assert switch.exchange_bytes_per_s() == pytest.approx(10.0)
    assert switch.sender_bytes_per_s() == pytest.approx(10.0)
    assert Topology(SWITCH, 1).exchange_bytes_per_s() is None
    # 0 sends a part to each: its link to 2 (4 bytes/s) carries that one and half of what goes to 3.
    square = Topology(SQUARE, 4)
    exchange, sender = square.exchange_bytes_per_s(), square.sender_bytes_per_s()
    assert sender == pytest.approx(3 / (1.5 / 4))
    assert exchange == pytest.approx(3 / square.exchange_s(np.ones((4, 4))).max())
    assert exchange is not None
    assert sender is not None
    assert exchange < sender
    # Alone, 0 -> 3 has half of what it sends on each of two links of 4 bytes/s; 0 -> 2 all of it on one.
    assert square.pair_bytes_per_s() == pytest.approx(4.0)
    assert switch.pair_bytes_per_s() is None


def test_nodes_share_nothing_but_the_rails() -> None:
    hardware = replace(SWITCH, ranks_per_node=2, network_bytes_per_s=2.0, network_latency_s=1.0)
    times = Topology(hardware, 4).exchange_s(sent(4, s0_1=30.0, s1_2=10.0))
    assert times.tolist() == [3.0, 6.0, 6.0, 0.0]


def test_host_links_are_shared_by_those_that_fetch() -> None:
    hardware = replace(
        SWITCH, ranks_per_host_link=2, shared_host_link_bytes_per_s=6.0, host_memory_bytes_per_s=6.0, ranks_per_socket=4
    )
    topology = Topology(hardware, 4)
    assert topology.host_fetch_s(12.0, np.array([1, 0, 0, 0]))[0] == 3.0  # its own link limits: 4
    assert topology.host_fetch_s(12.0, np.array([1, 0, 3, 0]))[0] == 4.0  # host memory limits: 6 / 2
    assert topology.host_fetch_s(12.0, np.array([1, 1, 1, 0]))[0] == 6.0  # host memory limits: 6 / 3
    alone = replace(hardware, host_memory_bytes_per_s=None)
    assert Topology(alone, 4).host_fetch_s(12.0, np.array([1, 1, 1, 0])).tolist() == [4.0, 4.0, 3.0, 3.0]


def test_who_fetches_less_leaves_the_link_to_the_other() -> None:
    hardware = replace(SWITCH, ranks_per_host_link=2, shared_host_link_bytes_per_s=6.0)
    # Half of 6 bytes/s each for 4 s; then rank 0 has 24 bytes left and its own link, 4 bytes/s, for itself.
    fetch_s = Topology(hardware, 2).host_fetch_s(12.0, np.array([3, 1]))
    assert fetch_s.tolist() == [(4.0 + 24 / 4) / 3, 4.0]


@examples(50)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=8))
def test_a_shared_link_carries_all_bytes_and_no_rank_is_faster_than_alone(num_fetches: list[int]) -> None:
    hardware = replace(SWITCH, ranks_per_host_link=4, shared_host_link_bytes_per_s=6.0)
    number = np.array(num_fetches)
    end_s = Topology(hardware, 8).host_fetch_s(12.0, number) * number
    assert (end_s >= number * 12.0 / 4.0 - 1e-9).all()
    for group in (slice(0, 4), slice(4, 8)):
        assert end_s[group].max() >= number[group].sum() * 12.0 / 6.0 - 1e-9
        busiest = number[group].max() * 12.0 / 4.0
        assert end_s[group].max() <= max(busiest, number[group].sum() * 12.0 / 6.0 + busiest / 2) + 1e-9


@examples(50)
@given(st.lists(st.floats(0, 1e6), min_size=16, max_size=16), st.floats(1.0, 4.0))
def test_more_bandwidth_never_takes_longer(values: list[float], factor: float) -> None:
    matrix = np.array(values).reshape(4, 4)
    nodes = replace(SWITCH, ranks_per_node=2, network_bytes_per_s=2.0)
    for slow, fast in (
        (SWITCH, replace(SWITCH, all_to_all_bytes_per_s=10.0 * factor)),
        (nodes, replace(nodes, network_bytes_per_s=2.0 * factor)),
        (SQUARE, Hardware(peer_bytes_per_s=[[factor * b for b in row] for row in SQUARE.peer_bytes_per_s or []])),
    ):
        assert (Topology(fast, 4).exchange_s(matrix) <= Topology(slow, 4).exchange_s(matrix) * (1 + 1e-12)).all()


def test_hardware_without_links_is_refused() -> None:
    with pytest.raises(ValueError, match="all_to_all_bytes_per_s: null"):
        Topology(Hardware(), 2)


@pytest.mark.parametrize("hardware", [SWITCH, SQUARE, replace(SWITCH, ranks_per_node=1, network_bytes_per_s=5.0)])
def test_links_that_are_twice_as_fast_take_half_the_time(hardware: Hardware) -> None:
    world_size = 4 if hardware.peer_bytes_per_s else 2
    sent = np.arange(world_size**2, dtype=np.float64).reshape(world_size, world_size)
    fast = replace(hardware, link_factor=2.0).resolved()
    assert fast.link_factor == 1.0
    np.testing.assert_allclose(
        Topology(fast, world_size).exchange_s(sent), Topology(hardware, world_size).exchange_s(sent) / 2
    )
    assert fast.host_link_bytes_per_s == hardware.host_link_bytes_per_s
    assert hardware.resolved() is hardware
    with pytest.raises(ValueError, match=r"hardware\.link_factor: 0, must be a number above 0"):
        replace(hardware, link_factor=0).resolved()


@examples(60)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_arrivals_over_links_are_those_of_the_exchange(world_size: int, seed: int) -> None:
    """What policies and schedules predict of weights on their way, against the links themselves."""
    rng = np.random.default_rng(seed)
    rates = rng.choice([4.0, 10.0, 40.0], (world_size, world_size)) * (1 - np.eye(world_size))
    hardware = Hardware(peer_bytes_per_s=rates.tolist(), peer_efficiency=0.8, all_to_all_latency_s=0.5)
    topology = Topology(hardware, world_size)
    home, expert_bytes = rng.integers(0, world_size, 12), 80.0
    from_peer = (rng.random((12, world_size)) < 0.3) & (home[:, None] != np.arange(world_size))
    halved = from_peer & (rng.random(from_peer.shape) < 0.4)
    sent_bytes = np.zeros((world_size, world_size))
    for expert, rank in np.argwhere(from_peer):
        sent_bytes[home[expert], rank] += expert_bytes / 2 if halved[expert, rank] else expert_bytes
    costs = machine_costs(ExpertCost(1.0, 9.0, peer_fetch_s=9.0, exchange_latency_s=0.5))
    arrived_s = arrivals_s(from_peer, halved, home, costs, topology.links(expert_bytes))
    receives = from_peer.any(axis=0)
    np.testing.assert_allclose(arrived_s[receives], topology.exchange_s(sent_bytes)[receives])
    assert (arrived_s[~receives] == 0).all()
