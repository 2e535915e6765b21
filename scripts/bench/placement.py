"""Times what policies do besides planning: fitting a placement to routing, and placing experts anew between batches."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.registry import discover
from experiments.routers.base import exact_counts
from experiments.routers.kit.hot import hot_shares
from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.runtime.device import Device
from harmoeny.trace import RoutingTrace
from results_schema.printing import print_anything

SIZES = ((2, 8), (8, 128), (64, 256))
#: Where only the placements between batches are timed, and in fewer batches.
LARGE = (1024, 256)
NUM_LAYERS = 6
TOKENS_PER_RANK = 2048
SKEW = 0.5
#: The paper's machine: one expert of 18.9 MB at 8.3 GB/s is worth 1512 tokens.
COST = ExpertCost(token_s=18.9e6 / 8.3e9 / 1512, fetch_s=18.9e6 / 8.3e9)
#: A token stays in its group of experts from one layer to the next with this probability.
AFFINITY = 0.6
_NUM_BATCHES = 40
_NUM_BATCHES_OF_LARGE = 9


@dataclass(frozen=True)
class Replacement:
    """What placing one layer anew costs, in batches whose hot experts change all the time.

    Attributes:
        policy: the policy.
        world_size: number of ranks.
        num_experts: experts per layer.
        num_replacements: how often the policy changed the placement.
        num_batches: in how many batches.
        median_us: time to decide one.
        moved_experts: mean over re-placements of the most experts that a rank had to copy in.
        held_experts: experts that a rank holds.
    """

    policy: str
    world_size: int
    num_experts: int
    num_replacements: int
    num_batches: int
    median_us: float
    moved_experts: float
    held_experts: int


@dataclass(frozen=True)
class Fit:
    """What fitting a placement to all layers costs, and what it is worth.

    Attributes:
        policy: the policy.
        world_size: number of ranks.
        num_experts: experts per layer.
        fit_s: time to fit.
        crossing_share: share of tokens that change rank between two layers.
        crossing_share_before: the same under contiguous placement.
    """

    policy: str
    world_size: int
    num_experts: int
    fit_s: float
    crossing_share: float
    crossing_share_before: float


def time_replacement(cls: type[Policy], world_size: int, num_experts: int) -> Replacement:
    """Show a policy batch after batch, each with another hot expert, and time the calls that change the placement."""
    policy = cls().calibrated(COST)
    placement = policy.place(0, num_experts, world_size)
    history: list[IntArray] = []
    samples_us, moved = [], []
    num_batches = _NUM_BATCHES_OF_LARGE if (world_size, num_experts) == LARGE else _NUM_BATCHES
    for batch in range(-1, num_batches):  # the first one compiles
        shares = hot_shares(SKEW, np.array([batch % num_experts]), num_experts)
        rng = np.random.default_rng(batch + 1)
        history.append(np.stack([exact_counts(shares, TOKENS_PER_RANK, 1, rng) for _ in range(world_size)]))
        start_ns = time.perf_counter_ns()
        new = policy.update_placement(0, history, placement)
        elapsed_us = (time.perf_counter_ns() - start_ns) / 1e3
        if new is None:
            continue
        if batch >= 0:
            samples_us.append(elapsed_us)
            moved.append(int((new.resident & ~placement.resident).sum(axis=0).max()))
        placement = new
    return Replacement(
        policy=cls.name,
        world_size=world_size,
        num_experts=num_experts,
        num_replacements=len(samples_us),
        num_batches=num_batches,
        median_us=float(np.median(samples_us)) if samples_us else 0.0,
        moved_experts=float(np.mean(moved)) if moved else 0.0,
        held_experts=int(placement.resident.sum(axis=0).max()),
    )


def time_fit(cls: type[Policy], world_size: int, num_experts: int) -> Fit:
    """Fit a policy to routing with affinity, as much as it asks for, and look at where tokens then go."""
    policy = cls().calibrated(COST)
    trace = routing_with_affinity(
        num_tokens=policy.calibration_batches * world_size * TOKENS_PER_RANK,
        num_experts=num_experts,
        num_groups=world_size,
    )
    start = time.perf_counter()
    fitted = policy.fitted(trace, num_experts, world_size)
    fit_s = time.perf_counter() - start
    return Fit(
        policy=cls.name,
        world_size=world_size,
        num_experts=num_experts,
        fit_s=fit_s,
        crossing_share=_crossing_share(fitted, trace, num_experts, world_size),
        crossing_share_before=_crossing_share(policy, trace, num_experts, world_size),
    )


def routing_with_affinity(num_tokens: int, num_experts: int, num_groups: int) -> RoutingTrace:
    """Route top-1 such that a token mostly stays in one group of experts, which are drawn anew for every layer."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, num_groups, num_tokens)
    expert_ids = []
    for _ in range(NUM_LAYERS):
        at = np.where(rng.random(num_tokens) < AFFINITY, at, rng.integers(0, num_groups, num_tokens))
        members = rng.permutation(num_experts).reshape(num_groups, -1)
        expert_ids.append(members[at, rng.integers(0, members.shape[1], num_tokens)][:, None])
    return RoutingTrace(expert_ids=expert_ids, stacks=[0] * NUM_LAYERS)


def _crossing_share(policy: Policy, trace: RoutingTrace, num_experts: int, world_size: int) -> float:
    ranks = [policy.place(layer, num_experts, world_size).home[ids[:, 0]] for layer, ids in enumerate(trace.expert_ids)]
    return float(np.mean([before != after for before, after in pairwise(ranks)]))


def show(replacements: Sequence[Replacement], fits: Sequence[Fit], console: Console) -> None:
    """Print one row per policy and size (ranks x experts), with the experts that a rank copies in and holds."""
    device = Device.of(torch.device("cpu")).name
    table = Table(title=f"Re-placement of one layer, another hot expert in every batch, {device}")
    for column in ("policy", "size", "batches", "changes", "median us", "copied", "of"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for r in replacements:
        table.add_row(
            r.policy,
            f"{r.world_size} x {r.num_experts}",
            str(r.num_batches),
            str(r.num_replacements),
            f"{r.median_us:.0f}",
            f"{r.moved_experts:.1f}",
            str(r.held_experts),
        )
    console.print(table)
    table = Table(title=f"Fit of {NUM_LAYERS} layers to routing with affinity, {device}")
    for column in ("policy", "size", "seconds", "tokens changing rank", "contiguous"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for f in fits:
        size = f"{f.world_size} x {f.num_experts}"
        table.add_row(f.policy, size, f"{f.fit_s:.2f}", f"{f.crossing_share:.1%}", f"{f.crossing_share_before:.1%}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; these costs have no budget, for they do not occur in every batch."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.placement", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    arguments = parser.parse_args(argv)

    systems = [cls for _, cls in sorted(discover("system")[0].items())]
    replacing = [cls for cls in systems if cls.update_placement is not Policy.update_placement]
    fitting = [cls for cls in systems if cls.fitted is not Policy.fitted]
    replacements = [time_replacement(cls, *size) for cls in replacing for size in (*SIZES, LARGE)]
    fits = [time_fit(cls, *size) for cls in fitting for size in SIZES]
    show(replacements, fits, Console())
    if arguments.json:
        content = {"replacements": [asdict(r) for r in replacements], "fits": [asdict(f) for f in fits]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
