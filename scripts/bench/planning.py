"""Times how long every policy plans and compares it with the budget, so that planning never shows up in a profile."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.registry import discover
from experiments.routers.base import FloatArray, RoutingRequest, exact_counts, route_by_shares
from experiments.routers.kit.hot import hot_shares
from experiments.simulator.flows import plan_fits
from harmoeny.cost import ExpertCost
from harmoeny.modelled import ChoosesShares
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy, moves_shared
from harmoeny.runtime.device import Device
from harmoeny.shared import make_plan
from harmoeny.trace import RoutingTrace
from results_schema.printing import print_anything

#: (world_size, num_experts): microseconds that the median may take.
BUDGETS_US = {(8, 128): 50.0, (64, 256): 2000.0, (1024, 256): 15_000.0}
#: The policies that are held to the budget; the others are timed all the same.
BUDGETED = ("harmoeny", "static_ep", "even_split", "drop")
#: What a policy's authors, or others with the same objective, say that their planner takes.
PUBLISHED = {
    "ultraep": "67 to 78 us on a GPU (64 x 256)",
    "lplb": "100 us on a GPU",
    "metro": "less than 90 us on a GPU (Janus, 16 instances)",
}
SKEWS = (0.0, 0.5, 0.9)
NUM_HOT = 4
TOKENS_PER_RANK = 16_384
#: Ranks of a node, up to which :data:`NODE_COST` is taken.
NODE_RANKS = 8
#: One node of 8 GPUs: an expert of Qwen3-30B-A3B on `dgx_h100`, where tokens, weights and stages may all pay.
NODE_COST = ExpertCost(
    token_s=3.5e-8, fetch_s=1.85e-4, exchange_token_s=1.3e-8, peer_fetch_s=5e-5, launch_s=5.9e-5, weights_s=4.6e-6,
    exchange_latency_s=2e-5, copy_token_s=4e-9, tile_tokens=128, grouped=True, relays=True,
)  # fmt: skip
#: Nodes of 8 GPUs: an expert of DeepSeek-V3 on `hgx_h200_x8_nodes`.
NODES_COST = ExpertCost(
    token_s=1.78e-7, fetch_s=1.65e-3, exchange_token_s=4.07e-7, peer_fetch_s=2.53e-3, launch_s=5.9e-5,
    weights_s=3e-5, exchange_latency_s=3e-5, copy_token_s=9.8e-9, tile_tokens=128, grouped=True, node_ranks=8,
    inside_share=0.112, network_share=1.007, relays=True,
)  # fmt: skip

_WARM_UP = 3  # the first one compiles
_MIN_SAMPLES = 20
_MAX_SAMPLES = 1000
_SAMPLING_S = 0.3


@dataclass(frozen=True)
class Timing:
    """How long one policy plans one batch."""

    policy: str
    world_size: int
    num_experts: int
    skew: float
    num_samples: int
    median_us: float
    p90_us: float
    budget_us: float
    budgeted: bool

    @property
    def within_budget(self) -> bool:
        """The median, since other work on the machine only shows in the slow samples."""
        return self.median_us <= self.budget_us


def time_policy(cls: type[Policy], world_size: int, num_experts: int, skew: float) -> Timing:
    """Time a policy's plan for one batch of skewed routing, top-1."""
    shares = hot_shares(skew, np.arange(NUM_HOT), num_experts)
    counts = np.stack(
        [exact_counts(shares, TOKENS_PER_RANK, 1, np.random.default_rng(rank)) for rank in range(world_size)]
    )
    policy = ready_policy(cls, shares, world_size)
    samples_us = sample_plans_us(policy, counts)
    return Timing(
        policy=cls.name,
        world_size=world_size,
        num_experts=num_experts,
        skew=skew,
        num_samples=len(samples_us),
        median_us=float(np.median(samples_us)),
        p90_us=float(np.percentile(samples_us, 90)),
        budget_us=BUDGETS_US[world_size, num_experts],
        budgeted=cls.name in BUDGETED,
    )


def has_room(world_size: int, num_experts: int) -> bool:
    """Return whether plans of that size are made."""
    return plan_fits(np.broadcast_to(np.int64(0), (world_size, num_experts)))


def ready_policy(cls: type[Policy], shares: FloatArray, world_size: int) -> Policy:
    """Return a policy with its defaults, calibrated and fitted (``shares``: float64 ``[num_experts]``)."""
    return fitted(cls().calibrated(NODE_COST if world_size <= NODE_RANKS else NODES_COST), shares, world_size)


def fitted(policy: Policy, shares: FloatArray, world_size: int) -> Policy:
    """Return a policy, fitted to routing by these shares (float64 ``[num_experts]``) if it learns from any."""
    if not policy.calibration_batches:
        return policy
    request = RoutingRequest(
        num_tokens=1024, num_experts=len(shares), top_k=1, batch=0, layer=0, rank=0, seed=0, world_size=1
    )
    trace = RoutingTrace(expert_ids=[route_by_shares(shares, request)] * 2, stacks=[0, 0])
    return policy.fitted(trace, len(shares), world_size)


def sample_plans_us(policy: Policy, counts: IntArray) -> list[float]:
    """Time plans of ``counts`` (int64 ``[world_size, num_experts]``) one by one, in microseconds.

    A policy that moves shared experts has one to move. A plan that has no room in memory is made without its table of
    who executes whose assignments.
    """
    plan: Callable[[IntArray, Placement], object] = partial(make_plan, policy)
    if isinstance(policy, ChoosesShares) and not plan_fits(counts):
        plan = policy.choose
    placement = policy.place(0, counts.shape[1], counts.shape[0])
    placement = policy.update_placement(0, [counts], placement) or placement
    if moves_shared(type(policy)):
        placement = placement.with_shared(1)
        counts = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)
    for _ in range(_WARM_UP):
        plan(counts, placement)
    samples_us: list[float] = []
    begin = time.perf_counter()
    while len(samples_us) < _MIN_SAMPLES or (
        len(samples_us) < _MAX_SAMPLES and time.perf_counter() - begin < _SAMPLING_S
    ):
        start_ns = time.perf_counter_ns()
        plan(counts, placement)
        policy.look_ahead(0, counts, placement)  # part of planning, for those that do
        samples_us.append((time.perf_counter_ns() - start_ns) / 1e3)
    return samples_us


def show(timings: Sequence[Timing], console: Console) -> None:
    """Print one row per policy, size (ranks x experts) and skew."""
    table = Table(title=f"Planning time, {TOKENS_PER_RANK} tokens per rank, {Device.of(torch.device('cpu')).name}")
    for column in ("policy", "size", "skew", "median us", "p90 us", "budget us", ""):
        table.add_column(column, justify="left" if column in ("policy", "") else "right", no_wrap=True)
    table.caption = "Published: " + "; ".join(f"{policy} {time}" for policy, time in PUBLISHED.items())
    for i, t in enumerate(timings):
        missed = "[bold red]OVER[/]" if t.budgeted else "[yellow](over)[/]"
        table.add_row(
            t.policy,
            f"{t.world_size} x {t.num_experts}",
            f"{t.skew:g}",
            f"{t.median_us:.1f}",
            f"{t.p90_us:.1f}",
            f"{t.budget_us:.0f}",
            "[green]ok[/]" if t.within_budget else missed,
            end_section=i % len(SKEWS) == len(SKEWS) - 1,
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a policy that is held to the budget missed it."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.planning", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings to FILE as well")
    arguments = parser.parse_args(argv)

    systems, unavailable = discover("system")
    timings = [
        time_policy(systems[name], world_size, num_experts, skew)
        for world_size, num_experts in BUDGETS_US
        for name in sorted(systems)
        if has_room(world_size, num_experts) or hasattr(systems[name], "choose")
        for skew in SKEWS
    ]
    console = Console()
    show(timings, console)
    for module, reason in unavailable.items():
        console.print(f"{module} is unavailable: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(t) for t in timings], indent=2) + "\n", encoding="utf-8")
    missed = sorted({t.policy for t in timings if t.budgeted and not t.within_budget})
    if missed:
        console.print(f"[bold red]Over the budget: {', '.join(missed)}[/]")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
