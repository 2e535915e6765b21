from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.drop import Drop
from baselines.eplb import EPLB
from baselines.eps_moe import EpsMoE
from baselines.even_split import EvenSplit
from baselines.fastermoe import FasterMoE
from baselines.static_ep import StaticEP
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator import flows
from experiments.simulator.advance import SimulatedLayer, SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.device_memory import OutOfMemoryError
from experiments.simulator.exchange import Arrivals, ExchangeTimes, stage_arrivals_s
from experiments.simulator.flows import flows_of_executed, plan_flows
from experiments.simulator.model_work import ModelWork
from experiments.simulator.sharing import sharing_pace
from experiments.simulator.topology import Topology
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.modelled import PredictsExecuted
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.timed import HarMoEny
from tests.strategies import examples

#: 1 s per token, 4 s per expert fetched, 1 s per token sent.
UNIT = Hardware(expert_flops_per_s=2.0, host_link_bytes_per_s=10.0, all_to_all_bytes_per_s=4.0)
NOTHING = np.zeros((0, 2))


def work(num_experts: int, **changes: Any) -> ModelWork:
    unit = ModelWork(
        dense=[NOTHING, NOTHING],
        route=[NOTHING],
        layer_tokens=[1],
        num_experts=num_experts,
        top_k=1,
        hidden_size=1,
        inner_width=2,
        element_bytes=4,
        expert_bytes=40,
        flops_per_token=2,
        dense_bytes=0,
        peak_bytes=0.0,
        stacks=[0],
        scope="layer",
    )
    return replace(unit, **changes)


def system(
    policy: Policy, counts: IntArray, hardware: Hardware = UNIT, software: SoftwareCost | None = None, **changes: Any
) -> SimulatedSystem:
    world_size, num_experts = counts.shape
    cost = CostModel(
        hardware, Topology(hardware, world_size), work(num_experts, **changes), software or SoftwareCost(plan_s=0.0)
    )
    return SimulatedSystem(policy, cost, hardware.device_memory_bytes)


def simulate(policy: Policy, counts: list[list[int]], hardware: Hardware = UNIT, **options: Any) -> SimulatedLayer:
    array = np.array(counts, dtype=np.int64)
    return system(policy, array, hardware, **options).run([array]).layers[0]


def column(layer: SimulatedLayer, name: str) -> list[float]:
    return [row[name] for row in layer.rows()]


def test_one_rank_takes_its_computation_and_nothing_else() -> None:
    hardware = replace(UNIT, expert_launch_s=0.5)
    layer = simulate(StaticEP(), [[3, 0, 4]], hardware)
    assert column(layer, "compute_s") == [3 + 4 + 2 * 0.5]
    assert column(layer, "layer_s") == column(layer, "compute_s")


def test_a_grouped_kernel_launches_once_per_wave() -> None:
    hardware = replace(UNIT, expert_launch_s=0.5, kernel="grouped_mm")
    layer = simulate(StaticEP(), [[3, 0, 4]], hardware)
    assert column(layer, "compute_s") == [3 + 4 + 0.5]
    # Half of expert 0 moves to rank 1, which executes its own expert until the weights are there: two waves.
    layer = simulate(TokenHarMoEny(threshold=1), [[6, 1], [6, 1]], hardware)
    assert column(layer, "executed_tokens") == [7, 7]
    waits = column(layer, "fetch_wait_s")
    assert column(layer, "compute_s") == [7 + 0.5, 7 + 2 * 0.5 + waits[1]]
    one_by_one = simulate(TokenHarMoEny(threshold=1), [[6, 1], [6, 1]], replace(hardware, kernel="loop"))
    assert column(one_by_one, "compute_s") == column(layer, "compute_s"), "here every wave is of one expert"


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_of_experts_overlap_as_their_cost_model_says(num_stages: int) -> None:
    def seconds(bytes_per_s: float, stages: int) -> float:
        # 8 tokens per rank and expert: 64 s of products, and 32 rows each way.
        hardware = replace(UNIT, all_to_all_bytes_per_s=bytes_per_s)
        layer = simulate(EpsMoE(num_stages=stages), [[8] * 8] * 2, hardware)
        assert len(set(column(layer, "layer_s"))) == 1
        return column(layer, "layer_s")[0] - column(layer, "metadata_s")[0]

    exchange_s = 2 * 32 * 4 / 8.0
    assert seconds(8.0, 1) == 64 + exchange_s
    saved_s = exchange_s * (num_stages - 1) / num_stages  # (N - 1) / N of what is shorter
    assert seconds(8.0, num_stages) == pytest.approx(64 + exchange_s - saved_s)
    # With slow links it is the products that hide: as much at least, and at most all.
    exchange_s = 2 * 32 * 4 / 2.0
    assert seconds(2.0, 1) == 64 + exchange_s
    assert exchange_s <= seconds(2.0, num_stages) <= 64 + exchange_s - 64 * (num_stages - 1) / num_stages


@pytest.mark.parametrize(
    ("wire_s", "wanted"), [(4.0, [[10, 11], [12, 12], [17, 17]]), (1.0, [[10, 11], [10, 11], [16, 16]])]
)
def test_the_first_rows_travel_while_the_rest_is_gathered(wire_s: float, wanted: list[list[float]]) -> None:
    """By hand: of 6 s of gathering, 3 are for what is sent first, from 8 s on, when the last rank has that."""

    def part(gather_s: float, wire_s: float) -> ExchangeTimes:
        both = np.ones(2)
        return ExchangeTimes(both, gather_s * both, wire_s * both, 0 * both, 0 * both)

    stages = [part(1.0, 0.0), part(2.0, wire_s), part(3.0, 5.0)]  # the first stage is each rank's own
    found = stage_arrivals_s(stages, part(6.0, 9.0), np.array([10.0, 11.0]))
    assert found.tolist() == wanted


@pytest.mark.parametrize(("wire_s", "wanted"), [(2.0, 22.0), (20.0, 38.0), (0.0, 19.0)])
def test_results_are_added_up_while_the_last_are_on_their_way(wire_s: float, wanted: float) -> None:
    """By hand: 4 s for those that are back after 9 s, and 6 s and half as long again for the last, if any travel."""
    both, traffic = np.ones(2), np.ones((2, 2))

    def part(wire_s: float, add_s: float) -> ExchangeTimes:
        return ExchangeTimes(both, 0 * both, wire_s * both, 0 * both, add_s * both)

    parts = [part(3.0, 4.0), part(wire_s, 6.0)]
    arrivals = Arrivals(np.array([[2.0, 2.0], [4.0, 4.0]]), np.zeros((2, 2)), parts, np.stack([traffic, traffic]))
    found = arrivals.added_s(np.array([[5.0, 6.0], [9.0, 8.0]]), part(5.0, 10.0))
    assert found.tolist() == [wanted, wanted]


def test_a_grouped_kernel_reads_all_weights_of_a_wave_while_it_computes() -> None:
    # Reading takes 4 s per expert, the rows 1 s each: apart 4 + 9, together as long as the longer of 8 and 10.
    hardware = replace(UNIT, device_memory_bytes_per_s=10.0, kernel="triton")
    layer = simulate(StaticEP(), [[1, 9]], hardware, hidden_size=0)
    assert column(layer, "compute_s") == [10.0]


def test_a_kernel_fills_tiles_and_is_slower_with_narrow_experts() -> None:
    hardware = replace(UNIT, kernel="grouped_mm", expert_tile_rows=4)
    assert column(simulate(StaticEP(), [[3, 0, 5]], hardware), "compute_s") == [4.0 + 8.0]
    hardware = replace(UNIT, expert_half_rate_width=2.0)  # the width of these experts
    assert column(simulate(StaticEP(), [[3, 0, 4]], hardware), "compute_s") == [2 * 7.0]


def test_rows_that_do_not_stay_in_the_cache_are_read_once_per_tile_of_columns() -> None:
    # A row is 4 bytes, so five stay. The weights take 4 s to read: half of that per row, for two columns at a time.
    hardware = replace(UNIT, kernel="grouped_mm", expert_tile_rows=2, device_memory_bytes_per_s=10.0, cache_bytes=20.0)
    cost = CostModel(hardware, Topology(hardware, 1), work(2), SoftwareCost())
    assert cost.wave_s([5]) == 6.0
    assert cost.wave_s([9]) == 9 * 2.0
    assert cost.wave_s([9, 5]) == 9 * 2.0 + 6.0
    assert cost.experts_s(np.array([[[9, 5], [5, 0]]])).tolist() == [cost.wave_s([9, 5]), cost.wave_s([5])]
    all_stay = CostModel(replace(hardware, cache_bytes=None), Topology(hardware, 1), work(2), SoftwareCost())
    assert all_stay.wave_s([9, 5]) == 10.0 + 6.0


def test_rows_are_put_in_order_unless_they_arrive_in_it() -> None:
    """Rows of several sources and several experts are read and written once more, there and back."""

    def seconds(counts: list[list[int]], *, puts: bool) -> tuple[float, float]:
        layer = simulate(StaticEP(), counts, replace(UNIT, device_memory_bytes_per_s=8.0, puts=puts))
        return column(layer, "dispatch_s")[1], column(layer, "layer_s")[1]

    def ordering_s(counts: list[list[int]]) -> tuple[float, float]:
        (dispatch_s, layer_s), (put_s, layer_put_s) = seconds(counts, puts=False), seconds(counts, puts=True)
        return dispatch_s - put_s, layer_s - layer_put_s

    # Rank 1 has the second half of the experts. It receives 8 rows of 4 bytes.
    assert ordering_s([[1, 0, 2, 3], [2, 0, 2, 1]]) == (8 * 2 * 4 / 8.0, 2 * 8 * 2 * 4 / 8.0)
    assert ordering_s([[1, 0, 5, 0], [2, 0, 3, 0]]) == (0.0, 0.0), "of one expert"
    assert ordering_s([[1, 0, 5, 3], [2, 0, 0, 0]]) == (0.0, 0.0), "of one source"


def test_ranks_of_one_device_slow_each_other_down_while_both_compute() -> None:
    shared = replace(UNIT, device_sharing=0.5)
    assert column(simulate(StaticEP(), [[4, 0], [0, 4]], shared), "compute_s") == [6.0, 6.0]
    # Rank 0 is through with 2 after 3 s, in which rank 1 did 2 of its 6.
    assert column(simulate(StaticEP(), [[2, 0], [0, 6]], shared), "compute_s") == [3.0, 3.0 + 4.0]
    assert column(simulate(StaticEP(), [[0, 3], [0, 3]], shared), "compute_s") == [0.0, 6.0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.0, 2.0))
def test_a_shared_device_does_all_the_work_and_no_rank_overtakes(alone_s: list[int], sharing: float) -> None:
    end_s = sharing_pace(np.array(alone_s, dtype=float), sharing) * alone_s
    assert np.array_equal(np.argsort(alone_s, kind="stable"), np.argsort(end_s, kind="stable"))
    # Second by second: whoever still computes gets the same.
    left, now_s, ends = np.array(alone_s, dtype=float), 0.0, np.zeros(len(alone_s))
    while (left > 1e-9).any():
        busy = left > 1e-9
        slower = 1 + sharing * (busy.sum() - 1)
        step = left[busy].min()
        now_s += step * slower
        left[busy] -= step
        ends[busy & (left <= 1e-9)] = now_s
    assert end_s == pytest.approx(ends)


def test_few_tokens_cost_at_least_the_reading_of_the_weights() -> None:
    hardware = replace(UNIT, device_memory_bytes_per_s=10.0)
    layer = simulate(StaticEP(), [[1, 9]], hardware, hidden_size=0)
    assert column(layer, "compute_s") == [4.0 + 9.0]


def test_two_ranks_and_one_link() -> None:
    # Rank 0 sends 5 tokens to expert 1, rank 1 sends 2 to expert 0; a token is 4 bytes and takes 1 s on the link.
    layer = simulate(StaticEP(), [[1, 5], [2, 3]])
    assert column(layer, "metadata_s") == [4.0, 4.0]  # two counts of 8 bytes
    assert column(layer, "dispatch_s") == [5.0, 5.0]
    assert column(layer, "compute_s") == [3.0, 8.0]
    assert column(layer, "combine_s") == [5.0 + 5.0, 5.0]  # rank 0 waits for rank 1's results
    assert column(layer, "layer_s") == [4.0 + 5.0 + 8.0 + 5.0] * 2
    assert column(layer, "sent_tokens") == [5, 2]


def test_smart_scheduling_executes_own_rows_while_the_others_are_on_their_way() -> None:
    # As above, but slices of own rows and of those that arrive after 5 s are apart, each with a launch of 0.5 s.
    hardware = replace(UNIT, expert_launch_s=0.5)
    layer = simulate(FasterMoE(shadowing=False), [[1, 5], [2, 3]], hardware)
    assert column(layer, "dispatch_s") == [0.0, 0.0]
    assert column(layer, "compute_s") == [5.0 + 2.5, 5.0 + 5.5]
    assert column(layer, "layer_s") == [4.0 + 5.0 + 5.5 + 5.0] * 2
    apart = simulate(FasterMoE(shadowing=False, smart_scheduling=False), [[1, 5], [2, 3]], hardware)
    assert column(apart, "layer_s") == [4.0 + 5.0 + 8.5 + 5.0] * 2


def test_ranks_wait_for_the_last_one_before_the_counts_are_known() -> None:
    counts = np.array([[1, 0], [0, 1]], dtype=np.int64)
    batch = system(StaticEP(), counts, layer_tokens=[1, 1], dense=[NOTHING] * 3, route=[NOTHING] * 2).run(
        [np.array([[5, 0], [0, 1]], dtype=np.int64), counts]
    )
    # Nothing is exchanged, so rank 1 is early in the second layer by the 4 tokens that rank 0 has more.
    first, second = batch.layers
    assert column(first, "compute_s") == [5.0, 1.0]
    assert column(second, "metadata_s") == [4.0, 8.0]
    assert batch.end_s.tolist() == [4.0 + 5.0 + 4.0 + 1.0] * 2


def test_a_fetch_is_hidden_behind_dispatch_and_residents() -> None:
    # 12 assignments, all for rank 0's expert 0: half of them move with its weights to rank 1.
    policy = TokenHarMoEny(threshold=1)
    layer = simulate(policy, [[6, 0], [6, 0]])
    assert column(layer, "executed_tokens") == [6, 6]
    assert column(layer, "dispatch_s") == [0.0, 0.0]  # rank 1 executes its own
    assert column(layer, "fetch_wait_s") == [0.0, 4.0]
    assert column(layer, "compute_s") == [6.0, 4.0 + 6.0]
    assert column(layer, "num_restores") == [0, 1]
    blocking = simulate(replace(policy, fetch="sync"), [[6, 0], [6, 0]])
    assert column(blocking, "compute_s") == [6.0, 4.0 + 6.0 + 4.0]


def test_padding_fills_every_expert_to_the_largest_count() -> None:
    software = SoftwareCost(plan_s=0.0, padded=True)
    layer = simulate(StaticEP(), [[1, 5], [2, 3]], software=software, layer_tokens=[6])
    assert column(layer, "compute_s") == [10.0, 10.0]  # two ranks' 5 rows for the one expert of each
    product_s = 2 * 6 * (2 * 5) * 1 / 2
    assert column(layer, "dispatch_s") == [product_s + 5.0] * 2
    assert column(layer, "executed_tokens") == [3, 8]


def test_a_policy_that_pads_says_to_what() -> None:
    class Padding(StaticEP):
        def capacity(self, counts: IntArray) -> int:
            return int(counts.max())

    layer = simulate(Padding(), [[1, 5], [2, 3]], layer_tokens=[6])
    assert column(layer, "compute_s") == [10.0, 10.0]
    assert column(layer, "padded_tokens") == [7, 2]
    assert column(layer, "dispatch_s") == [5.0, 5.0]  # of copies, where memory takes no time, not of a product


def test_a_capacity_limit_drops_what_is_above() -> None:
    software = SoftwareCost(plan_s=0.0, padded=True, capacity_limit=4)
    layer = simulate(StaticEP(), [[1, 5], [2, 3]], software=software, layer_tokens=[6])
    assert column(layer, "dropped_tokens") == [1, 0]
    assert column(layer, "compute_s") == [8.0, 8.0]


def test_software_costs_are_added_where_they_belong() -> None:
    software = SoftwareCost(layer_s=1.0, token_s=0.5, plan_s=2.0, plan_step_s=3.0)
    layer = simulate(TokenHarMoEny(threshold=1), [[6, 0], [6, 0]], software=software, layer_tokens=[6])
    assert column(layer, "route_s") == [4.0, 4.0]
    assert column(layer, "plan_s") == [5.0, 5.0]  # one expert moves
    software = SoftwareCost(plan_s=2.0, plan_entry_s=0.5)
    layer = simulate(TokenHarMoEny(threshold=1), [[6, 0], [6, 0]], software=software, layer_tokens=[6])
    assert column(layer, "plan_s") == [6.0, 6.0]  # 2 ranks x 2 experts x 2 ranks


def test_what_does_not_fit_gives_no_number() -> None:
    # 40 bytes for the slot; 5 rows sent, 3 x 8 executed, and 8 values on either side of 8 tokens' activation.
    needed = 40.0 + 4 * (5 + 3 * 8) + 2 * 8 * 2 * 4
    simulate(StaticEP(), [[1, 5], [2, 3]], replace(UNIT, device_memory_bytes=needed))
    with pytest.raises(OutOfMemoryError, match=r"rank 1 needs .* MoE layer 0"):
        simulate(StaticEP(), [[1, 5], [2, 3]], replace(UNIT, device_memory_bytes=needed - 1))


COUNTS = st.integers(1, 4).flatmap(
    lambda w: st.integers(1, 6).flatmap(
        lambda e: st.lists(st.lists(st.integers(0, 50), min_size=e, max_size=e), min_size=w, max_size=w)
    )
)


@examples(40)
@given(COUNTS)
def test_nothing_is_lost_and_bytes_are_those_of_the_fetches(counts: list[list[int]]) -> None:
    for policy in (
        StaticEP(),
        TokenHarMoEny(threshold=3),
        EvenSplit(fetch="sync"),
        Drop(),
        TokenHarMoEny(threshold=3, fetch="peer"),
    ):
        layer = simulate(policy, counts)
        assert sum(column(layer, "executed_tokens")) + sum(column(layer, "dropped_tokens")) == np.sum(counts)
        for row in layer.rows():
            assert row["fetch_bytes"] == 40 * (row["num_host_fetches"] + row["num_peer_fetches"])
            assert row["fetch_s"] >= row["num_host_fetches"] * 4.0 - 1e-9
            phases = sum(row[f"{p}_s"] for p in ("route", "metadata", "plan", "dispatch", "compute", "combine"))
            assert phases == pytest.approx(row["layer_s"])
            assert row["compute_s"] == pytest.approx(
                row["executed_tokens"] + row["fetch_wait_s"] + row["restore_wait_s"]
            )


@examples(40)
@given(COUNTS, st.floats(1.0, 5.0))
def test_a_faster_machine_is_never_slower(counts: list[list[int]], factor: float) -> None:
    for policy in (StaticEP(), EvenSplit(fetch="sync")):
        slow = simulate(policy, counts).boundary_s[-1].max()
        for name in ("expert_flops_per_s", "host_link_bytes_per_s", "all_to_all_bytes_per_s"):
            fast = simulate(policy, counts, replace(UNIT, **{name: getattr(UNIT, name) * factor}))
            assert fast.boundary_s[-1].max() <= slow * (1 + 1e-12)


@examples(40)
@given(COUNTS)
def test_flows_without_a_plan_agree_with_the_plan(counts: list[list[int]]) -> None:
    array = np.array(counts, dtype=np.int64)
    for policy in (StaticEP(), TokenHarMoEny(threshold=3), TokenHarMoEny(threshold=3, stop_rule="paper"), EPLB()):
        placement = policy.place(0, array.shape[1], array.shape[0])
        planned = plan_flows(policy, array, placement)
        assert isinstance(policy, PredictsExecuted)
        executed = policy.executed(array, placement)
        assert executed is not None
        np.testing.assert_array_equal(executed, planned.executed)
        found = flows_of_executed(array, executed, placement)
        np.testing.assert_array_equal(found.fetch, planned.fetch)
        np.testing.assert_allclose(found.traffic.sum(axis=0), planned.traffic.sum(axis=0))
        np.testing.assert_allclose(found.traffic.sum(axis=1), planned.traffic.sum(axis=1))
        np.testing.assert_allclose(found.traffic.diagonal(), planned.traffic.diagonal())


def test_shares_say_what_a_plan_that_is_too_large_would(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, fetches, overlaps, staged, relays = np.random.default_rng(0), 0, 0, 0, 0
    for row_s in np.repeat([0.2, 1.0, 5.0], 20):
        cost = ExpertCost(
            1.0, 60.0, exchange_token_s=float(row_s), peer_fetch_s=30.0, exchange_latency_s=1.0, relays=True
        )
        policy = HarMoEny(settle=False, num_stages=None if rng.random() < 0.5 else 1).calibrated(cost)
        counts = rng.multinomial(300, rng.dirichlet(np.full(8, 0.5)), 4).astype(np.int64)
        placement = policy.place(0, 8, 4)
        planned = plan_flows(policy, counts, placement)
        with monkeypatch.context() as small:
            small.setattr(flows, "_LARGEST_PLAN_BYTES", 0)
            chosen = plan_flows(policy, counts, placement)
        np.testing.assert_array_equal(chosen.executed, planned.executed)
        np.testing.assert_array_equal(chosen.fetch, planned.fetch)
        assert planned.from_peer is not None
        np.testing.assert_array_equal(chosen.from_peer, planned.from_peer)
        # Where a cut goes through an expert, every source's part of it is rounded.
        np.testing.assert_allclose(chosen.stages, planned.stages, rtol=0, atol=len(counts) - 1)
        halved, halved_too = (np.zeros_like(f.fetch) if f.halved is None else f.halved for f in (chosen, planned))
        np.testing.assert_array_equal(halved, halved_too)
        assert (chosen.senders is None) == (planned.senders is None)
        if planned.senders is not None and chosen.senders is not None:
            np.testing.assert_array_equal(chosen.senders, planned.senders)
            relays += 1
        assert chosen.predicted_s == pytest.approx(planned.predicted_s)
        fetches += int(planned.fetch.any())
        if planned.stage_traffic is None or chosen.stage_traffic is None:
            assert planned.stage_traffic is chosen.stage_traffic
            overlaps += planned.slices is not None
        else:
            np.testing.assert_array_equal(chosen.stage_traffic, planned.stage_traffic)
            staged += 1
    assert fetches
    assert overlaps
    assert staged
    assert relays


def test_an_exchange_ends_for_every_rank_by_itself() -> None:
    cost = CostModel(UNIT, Topology(UNIT, 3), work(3), SoftwareCost(plan_s=0.0))
    rows = np.zeros((3, 3))
    rows[0, 1] = 2.0
    assert cost.exchange_s(rows).tolist() == [2.0, 2.0, 0.0]
