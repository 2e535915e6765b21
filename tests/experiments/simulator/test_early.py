"""Head starts by hand: early rows are computed while counts travel and the plan is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from baselines.static_ep import StaticEP
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedLayer
from experiments.simulator.cost import CostModel
from experiments.simulator.topology import Topology
from harmoeny.head_start import HeadStart
from harmoeny.placement import Placement
from harmoeny.timed import HarMoEny
from tests.experiments.simulator import test_advance
from tests.experiments.simulator.test_advance import UNIT, simulate, work


def column(layer: SimulatedLayer, name: str) -> list[float]:
    """Seconds without the microseconds in which the host finds out what is early."""
    return [round(value, 4) for value in test_advance.column(layer, name)]


@dataclass(kw_only=True)
class Early(StaticEP):
    """Static expert parallelism with a head start of so many rows."""

    name: ClassVar[str] = "early"
    rows: int = 0

    def begin_early(self, placement: Placement) -> HeadStart | None:  # noqa: ARG002
        return HeadStart(self.rows, 0, 1, 1, 100) if self.rows else None


def test_own_rows_are_executed_while_counts_travel() -> None:
    # Two counts of 8 bytes take 4 s. Rank 0 has one row for its expert, rank 1 has three.
    counts = [[1, 5], [2, 3]]
    assert column(simulate(Early(), counts), "layer_s") == [4.0 + 5.0 + 8.0 + 5.0] * 2
    layer = simulate(Early(rows=3), counts)
    assert column(layer, "metadata_s") == [4.0, 4.0]
    assert column(layer, "compute_s") == [2.0, 5.0]
    assert column(layer, "layer_s") == [4.0 + 5.0 + 5.0 + 5.0] * 2
    assert column(layer, "num_assignments") == [6, 5]
    assert column(layer, "executed_tokens") == [3, 8]
    assert column(layer, "sent_tokens") == [5, 2]
    assert column(layer, "dropped_tokens") == [0, 0]
    assert column(layer, "num_active_experts") == [1, 1]
    part = simulate(Early(rows=2), counts)
    assert column(part, "compute_s") == [2.0, 6.0]


def test_beginning_takes_time_of_its_own() -> None:
    counts = [[0, 5], [2, 3]]  # only rank 1 has rows of its expert
    layer_s = [
        column(simulate(Early(rows=3), counts, replace(UNIT, early_s=seconds)), "layer_s")
        for seconds in (0.0, 1.0, 1.5)
    ]
    # Its three rows are executed after 3 s, and counts are there after 4 s.
    assert layer_s[1] == layer_s[0]
    assert layer_s[2] == [seconds + 0.5 for seconds in layer_s[0]]


def test_nothing_else_begins_before_early_rows_are_done() -> None:
    # Counts are there after 4 s and planned after 7 s, when rank 0 still executes early rows for 2 s.
    software = SoftwareCost(plan_s=3.0)
    layer = simulate(Early(rows=9), [[9, 1], [0, 1]], software=software)
    assert column(layer, "plan_s") == [5.0, 3.0]
    assert column(layer, "layer_s")[0] == 4.0 + 5.0 + 1.0 + 1.0 + 1.0
    assert column(layer, "executed_tokens") == [9, 2]


def test_early_rows_are_gathered_and_their_results_added_up() -> None:
    # A row is 4 bytes, read and written in 1 s: 3 rows are gathered, and their results added in 3 * 1.5 s.
    hardware = (
        replace(UNIT, device_memory_bytes_per_s=8.0, hbm_name=None)
        if False
        else replace(UNIT, device_memory_bytes_per_s=8.0)
    )
    late = simulate(Early(rows=3), [[3, 0], [0, 3]], hardware, hidden_size=1, expert_bytes=8)
    # Three rows: 3 s of copies, and 3 s of products, of which 4 s are behind the counts.
    assert column(late, "plan_s") == [6.0 - 4.0] * 2
    assert column(late, "compute_s") == [0.0, 0.0]
    assert column(late, "combine_s") == [4.5, 4.5]


def test_the_host_finds_out_what_is_early_before_it_plans() -> None:
    begun, late = (
        simulate(Early(rows=rows), [[3, 1], [0, 3]], replace(UNIT, all_to_all_latency_s=9.0)) for rows in (3, 0)
    )
    assert test_advance.column(late, "plan_s") == [0.0, 0.0]
    assert test_advance.column(begun, "plan_s") == pytest.approx([5e-6 + 4 * 1.4e-9] * 2)


def test_ranks_of_one_device_slow_each_other_down_in_early_rows_too() -> None:
    shared = replace(UNIT, device_sharing=0.5)
    layer = simulate(Early(rows=8), [[8, 0], [0, 8]], shared)
    assert column(layer, "plan_s") == [12.0 - 4.0] * 2


@pytest.mark.parametrize("skew", [0, 400])
def test_harmoeny_executes_everything_and_is_itself_without_a_head_start(skew: int) -> None:
    hardware = replace(UNIT, all_to_all_latency_s=40.0)
    counts = np.full((2, 4), 100)
    counts[:, 1] += skew
    cost = CostModel(hardware, Topology(hardware, 2), work(4), SoftwareCost()).expert
    layers = {
        on: simulate(HarMoEny(head_start=on, settle=False).calibrated(cost), counts.tolist(), hardware)
        for on in (True, False)
    }
    for layer in layers.values():
        assert sum(column(layer, "executed_tokens")) == counts.sum()
        assert column(layer, "num_assignments") == counts.sum(axis=1).tolist()
        assert column(layer, "dropped_tokens") == [0, 0]
    assert max(column(layers[True], "layer_s")) < max(column(layers[False], "layer_s"))
