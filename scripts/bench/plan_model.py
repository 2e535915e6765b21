"""Fit how long every policy plans, and write it for the simulator: conf/simulator/bench.yaml.

A simulation with ``simulator=bench`` is the same on every machine. Batches of several machines, models, sizes and
routings are simulated, and the plans that are made in them, of the placements that they have by then, are timed on this
machine. Their times are explained by a constant, the entries of a plan, the moves in it, and by ranks times experts,
alone and where anything moves, experts have copies, or there are stages; none of that is below 0, an entry and a rank
and expert alone take no less than with static placement, which does nothing else, and the sum of all samples' relative
errors is least, so that single plans that take far longer decide nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.optimize import linprog

from experiments.compose.compose import compose_point
from experiments.point.simulator_options import PLAN_TERMS, SoftwareCost
from experiments.registry import discover
from experiments.routers.base import FloatArray, exact_counts
from experiments.routers.kit.hot import hot_shares
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.flows import plan_flows
from experiments.simulator.model_work import LayerShape
from experiments.simulator.plan_size import plan_size
from experiments.simulator.plan_times import PlanTimes
from experiments.simulator.topology import Topology
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy
from harmoeny.runtime.device import Device
from harmoeny.shared import make_plan
from results_schema.atomic import write_text
from results_schema.printing import print_anything
from scripts.bench.planning import NUM_HOT, fitted

OUT = Path("conf/simulator/bench.yaml")
SWITCH = LayerShape(128, 768, 3072, gated=False)
QWEN = LayerShape(128, 2048, 768, top_k=8)
DEEPSEEK = LayerShape(256, 7168, 2048, top_k=8)
#: Profile of hardware, ranks, layer.
MACHINES = (
    ("dgx1_v100", 8, SWITCH), ("dgx_a100", 8, QWEN), ("dgx_a100", 8, SWITCH), ("dgx_h100", 8, QWEN),
    ("dgx_h100", 8, DEEPSEEK), ("hgx_h200_x8_nodes", 32, SWITCH), ("hgx_h200_x8_nodes", 32, QWEN),
    ("hgx_h200_x8_nodes", 32, DEEPSEEK), ("hgx_h200_x8_nodes", 64, DEEPSEEK),
)  # fmt: skip
TOKENS_PER_RANK = (64, 512, 4096)
#: Share of all assignments to hot experts; whether these are others in every batch.
ROUTINGS = ((0.0, False), (0.5, False), (0.9, False), (0.5, True))
SPARE_SLOTS = 2
#: Batches before the timed ones, by which placements have settled, and timed ones.
NUM_BEFORE, NUM_TIMED = 9, 2
#: Times that a plan is made, and no more once they took so long.
_REPEATS, _ENOUGH_S = 15, 0.1
#: What it takes to fill a plan's table is what this takes; others take that, too.
_TABLE_ONLY = "static_ep"
#: A system that has its options from a preset plans as the class that it is of.
PRESETS = {"harmoeny_paper": "harmoeny_tokens", "harmoeny_sync": "harmoeny_tokens"}


class _Sampled(PlanTimes):
    """Times every plan, and keeps what it goes by."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = policy
        self.samples: list[tuple[float, ...]] = []

    def seconds(self, counts: IntArray, placement: Placement, measure: Callable[[], float]) -> float:  # noqa: ARG002
        """Return the median of several plans, in seconds; ``measure`` would take too few."""
        times: list[float] = []
        while len(times) < 3 or (len(times) < _REPEATS and sum(times) < _ENOUGH_S):
            begin = time.perf_counter()
            make_plan(self._policy, counts, placement)
            times.append(time.perf_counter() - begin)
        size = plan_size(plan_flows(self._policy, counts, placement), counts, placement)
        self.samples.append((float(np.median(times)), *size.terms))
        return self.samples[-1][0]


def samples(cls: type[Policy]) -> Iterator[tuple[float, ...]]:
    """Yield seconds, and :attr:`PlanSize.terms`, of plans of every machine, size and routing."""
    for hardware_name, world_size, shape in MACHINES:
        hardware = compose_point("experiment=smoke", f"hardware={hardware_name}").hardware
        for num_tokens in TOKENS_PER_RANK:
            work = shape.work(num_tokens)
            cost = CostModel(hardware, Topology(hardware, world_size), work, SoftwareCost())
            for skew, moves in ROUTINGS:
                shares = hot_shares(skew, np.arange(NUM_HOT), shape.num_experts)
                policy = cls() if cls.bound else cls().with_spare_slots(SPARE_SLOTS, shape.num_experts, world_size)
                policy = fitted(policy.calibrated(cost.expert), shares, world_size)
                sampled = _Sampled(policy)
                system = SimulatedSystem(policy, cost, plan_times=sampled)
                for batch in range(NUM_BEFORE + NUM_TIMED):
                    if batch == NUM_BEFORE:
                        sampled.samples.clear()
                    system.run([_counts(shares, world_size, num_tokens * shape.top_k, batch if moves else 0)])
                yield from sampled.samples


def _counts(shares: FloatArray, world_size: int, num_assignments: int, shift: int) -> IntArray:
    """Return int64 ``[world_size, num_experts]``, with the hot experts so many times further on."""
    shares = np.roll(shares, shift * NUM_HOT)
    return np.stack([exact_counts(shares, num_assignments, 1, np.random.default_rng(r)) for r in range(world_size)])


def fit(measured: FloatArray, least: FloatArray | float = 0.0) -> FloatArray:
    """Return seconds per term.

    Args:
        measured: float64 ``[num_samples, 1 + num_terms]``, seconds and terms.
        least: float64 ``[num_terms]``, what each takes at least, or one number for all.
    """
    seconds, terms = measured[:, :1], measured[:, 1:]
    scale = terms.max(axis=0)
    scale[scale == 0] = 1.0
    # In parts of what was measured: a sum of terms, 1 at best, and by how much it is off on either side.
    parts, off, (num_samples, num_terms) = terms / scale / seconds * seconds.mean(), np.eye(len(terms)), terms.shape
    found = linprog(
        np.concatenate([np.zeros(num_terms), np.ones(2 * num_samples)]),
        A_eq=np.hstack([parts, off, -off]), b_eq=np.ones(num_samples), method="highs",
        bounds=[(low, None) for low in (*(least * scale / seconds.mean()), *np.zeros(2 * num_samples))],
    )  # fmt: skip
    assert found.x is not None, found.message
    costs: FloatArray = found.x[:num_terms] / scale * seconds.mean()
    return costs


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.plan_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file (default: {OUT})")
    parser.add_argument("systems", nargs="*", help="fit these and leave the others as they are (default: all)")
    arguments = parser.parse_args()
    known = discover("system")[0]
    if unknown := sorted(set(arguments.systems) - set(known)):
        parser.error(f"systems: {unknown[0]!r}, must be of {', '.join(sorted(known))}")
    found = {}
    if arguments.systems:
        found = yaml.safe_load(arguments.out.read_text(encoding="utf-8"))["software"]
    for name in sorted(arguments.systems or known, key=lambda name: (name != _TABLE_ONLY, name)):
        measured = np.array(list(samples(known[name])))
        table = {} if name == _TABLE_ONLY else found[_TABLE_ONLY]
        least = [table.get(term, 0.0) if term in ("plan_entry_s", "plan_cell_s") else 0.0 for term in PLAN_TERMS]
        costs = fit(measured, np.array(least))
        found[name] = dict(zip(PLAN_TERMS, costs.tolist(), strict=True))
        error = np.abs(measured[:, 1:] @ costs / measured[:, 0] - 1)
        print(f"{name:20} off by {np.median(error):.0%} in the median, {error.max():.0%} at most", flush=True)
    found |= {preset: found[name] for preset, name in PRESETS.items()}
    lines = []
    for name, parts in sorted(found.items()):
        terms = [f"{term}: {seconds:.2e}" for term, seconds in parts.items() if seconds > 0 or term == "plan_s"]
        lines.append(f"  {name}: {{{', '.join(terms)}}}")
    core = Device.of(torch.device("cpu")).name
    head = (
        f"# What planning takes, fitted to plans that were timed on one core of a {core}:\n"
        "# python -m scripts.bench.plan_model. Seconds per plan, per entry of its tokens, per move in it, and per\n"
        "# rank and expert, and where anything moves, experts have copies, or there are stages.\n"
        "batch_size: {}\nsoftware:\n"
    )
    write_text(arguments.out, head + "\n".join(lines) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
