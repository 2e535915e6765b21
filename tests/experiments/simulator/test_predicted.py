"""HarMoEny's cost model of plans against the simulator, which has every rank's schedule, links and copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.topology import Topology
from harmoeny.hardware import Hardware
from harmoeny.placement import IntArray
from harmoeny.timed import HarMoEny
from tests.experiments.simulator.test_advance import work

#: About what an H200 and a V100 are.
GROUPED = Hardware(
    kernel="grouped_mm", expert_flops_per_s=6e14, expert_tile_rows=128, expert_launch_s=6e-5,
    host_link_bytes_per_s=5e10, host_link_latency_s=1e-5, device_memory_bytes_per_s=3e12, all_to_all_bytes_per_s=3e11,
    all_to_all_latency_s=2e-5, ranks_per_node=4, network_bytes_per_s=3.5e10, network_latency_s=1e-5,
)  # fmt: skip
ONE_BY_ONE = Hardware(
    expert_flops_per_s=1.4e13, expert_launch_s=1e-4, host_link_bytes_per_s=8e9, device_memory_bytes_per_s=5e11,
    all_to_all_bytes_per_s=3e10, all_to_all_latency_s=3e-4,
)  # fmt: skip
#: As those of a DGX-1, ranks are joined by links of their own, some of them slow.
LINKED = Hardware(
    expert_flops_per_s=1.4e13, expert_launch_s=1e-4, host_link_bytes_per_s=8e9, device_memory_bytes_per_s=5e11,
    all_to_all_latency_s=3e-4, peer_bytes_per_s=[[0, 4e10, 2e10, 7e9], [4e10, 0, 7e9, 2e10], [2e10, 7e9, 0, 4e10],
                                                 [7e9, 2e10, 4e10, 0]],
)  # fmt: skip
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH, NUM_BATCHES = 32, 4, 2048, 1536, 60


class Case(NamedTuple):
    """A batch: what it takes by the simulator and by the plan, and whether that fetches, or has stages of experts."""

    ratio: float
    fetches: bool
    staged: bool


def batch(rng: np.random.Generator, world_size: int) -> IntArray:
    """Return counts of any size and skew."""
    shares = np.minimum(rng.dirichlet(np.full(NUM_EXPERTS, rng.choice([0.1, 1.0, 50.0]))), 1 / TOP_K)
    assignments = TOP_K * int(2 ** rng.uniform(5, 14))
    drawn = [rng.multinomial(assignments, shares / shares.sum()) for _ in range(world_size)]
    return np.stack(drawn).astype(np.int64)


def cases(hardware: Hardware, world_size: int, spare_slots: int) -> list[Case]:
    """Simulate batches, each from the start."""
    rng, found = np.random.default_rng(world_size + spare_slots), []
    model = work(
        NUM_EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, inner_width=WIDTH, element_bytes=2, expert_bytes=9_400_000,
        flops_per_token=9_400_000,
    )  # fmt: skip
    cost = CostModel(hardware, Topology(hardware, world_size), model, SoftwareCost(plan_s=0.0))
    policy = HarMoEny(spare_slots=spare_slots, settle=False).calibrated(cost.expert)
    placement = policy.place(0, NUM_EXPERTS, world_size)
    for _ in range(NUM_BATCHES):
        counts = batch(rng, world_size)
        plan = policy.plan(counts, placement)
        layer = SimulatedSystem(policy, cost).run([counts]).layers[0]
        simulated_s = (layer.boundary_s[-1] - layer.boundary_s[3]).max()
        assert plan.predicted_s is not None
        found.append(Case(simulated_s / plan.predicted_s, bool(plan.fetch.any()), plan.stages is not None))
    return found


@pytest.mark.many
@pytest.mark.parametrize("spare_slots", [0, 2])
@pytest.mark.parametrize(("hardware", "world_size"), [(GROUPED, 4), (GROUPED, 8), (ONE_BY_ONE, 4), (LINKED, 4)])
def test_predicted_is_what_is_simulated(hardware: Hardware, world_size: int, spare_slots: int) -> None:
    """A plan that moves nothing takes what was predicted, in stages nearly; with fetches it takes 0.3 more at most.

    In stages it may take less, as the first of them may need not all that is fetched.
    """
    found = cases(hardware, world_size, spare_slots)
    for case in found:
        least, most = (0.85, 1.3) if case.fetches else (0.95, 1.03) if case.staged else (0.98, 1.01)
        least -= 0.05 * (case.fetches and case.staged)
        assert least <= case.ratio <= most, case
    assert {case.fetches for case in found} == {True, False}
    assert {case.staged for case in found} == {True, False}
    assert np.median([case.ratio for case in found if case.fetches]) == pytest.approx(1.0, abs=0.05)
