"""Times the simulator on one batch of 1,024 ranks x 256 experts x 58 layers: 10 s and 4 GiB for HarMoEny and EPLB.

Smaller worlds show how the cost grows. The routing is drawn beforehand. EPLB has placed its replicas by an earlier
batch; how long that takes to simulate, once every few batches, stands beside. Times are those of the processor, all
threads together, so that what else runs on the machine matters little.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from baselines.eplb import EPLB
from experiments.compose.compose import compose_point
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.model_work import LayerShape
from experiments.simulator.topology import Topology
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.timed import HarMoEny
from results_schema.printing import print_anything

NUM_EXPERTS = 256
NUM_LAYERS = 58
TOP_K = 8
TOKENS_PER_RANK = 4096
WORLD_SIZES = (64, 256, 1024)
LIMIT_S, LIMIT_PLACING_S, LIMIT_GIB = 10.0, 1.0, 4.0


#: The MoE layers of DeepSeek-V3 (arXiv 2412.19437), here in BF16.
DEEPSEEK = LayerShape(NUM_EXPERTS, 7168, 2048, TOP_K)


def draw_counts(world_size: int) -> list[IntArray]:
    """Draw Zipf routing with another order of experts in every layer; int64 ``[world_size, num_experts]`` each."""
    rng = np.random.default_rng(0)
    popularity = np.arange(1, NUM_EXPERTS + 1) ** -0.5
    popularity /= popularity.sum()
    return [
        rng.multinomial(TOKENS_PER_RANK * TOP_K, rng.permutation(popularity), size=world_size).astype(np.int64)
        for _ in range(NUM_LAYERS)
    ]


def measure(policy: Policy, world_size: int, counts: list[IntArray]) -> list[float]:
    """Return how long the first three batches take to simulate; before the second one EPLB places its replicas."""
    hardware = compose_point("experiment=smoke", "hardware=hgx_h200_x8_nodes").hardware
    cost = CostModel(
        hardware, Topology(hardware, world_size), DEEPSEEK.work(TOKENS_PER_RANK, NUM_LAYERS), SoftwareCost(plan_s=0.0)
    )
    system = SimulatedSystem(policy.calibrated(cost.expert), cost)
    times = [time.process_time()]
    for _ in range(3):
        system.run(counts)
        times.append(time.process_time())
    return np.diff(times).tolist()


def measure_placing(policy: Policy, world_size: int, counts: list[IntArray]) -> float:
    """Return how long a policy takes to place all layers anew after one batch, without copying anything."""
    placements = [policy.place(layer, NUM_EXPERTS, world_size) for layer in range(len(counts))]
    policy.update_placement(0, counts[:1], placements[0])  # compiles
    begin = time.process_time()
    for layer, (layer_counts, placement) in enumerate(zip(counts, placements, strict=True)):
        policy.update_placement(layer, [layer_counts], placement)
    return time.process_time() - begin


def main() -> None:
    """Measure and print a table.

    Raises:
        SystemExit: the largest world takes too long or too much memory, or EPLB to choose its places.
    """
    print_anything()
    argparse.ArgumentParser(prog="python -m scripts.bench.simulator", description=__doc__).parse_args()
    columns = ("ranks", "HarMoEny s", "EPLB s", "together s", "EPLB, placing anew s", "choosing places s")
    table = Table(
        *columns,
        "us per rank x expert x layer",
        "peak GiB",
        title=f"{NUM_EXPERTS} experts x {NUM_LAYERS} layers, one batch",
    )
    for world_size in WORLD_SIZES:
        counts = draw_counts(world_size)
        *_, harmoeny_s = measure(HarMoEny(), world_size, counts)
        _, placing_s, eplb_s = measure(EPLB(), world_size, counts)
        total_s, choosing_s = harmoeny_s + eplb_s, measure_placing(EPLB(), world_size, counts)
        per_cell_us = total_s / (world_size * NUM_EXPERTS * NUM_LAYERS) * 1e6
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        values = (harmoeny_s, eplb_s, total_s, placing_s, choosing_s, per_cell_us, peak_gib)
        table.add_row(str(world_size), *(f"{value:.2f}" for value in values))
    Console().print(table)
    if choosing_s > LIMIT_PLACING_S:
        raise SystemExit(f"error: choosing EPLB's places takes {choosing_s:.1f} s, must be {LIMIT_PLACING_S:g} s")
    if total_s > LIMIT_S or peak_gib > LIMIT_GIB:
        raise SystemExit(f"error: {total_s:.1f} s and {peak_gib:.1f} GiB, must be {LIMIT_S:g} s and {LIMIT_GIB:g} GiB")


if __name__ == "__main__":
    main()
