"""Fit how long every policy plans, and write it for the simulator: conf/simulator/bench.yaml.

A simulation with ``simulator=bench`` is the same on every machine. Plans of several sizes are timed, with and without
skew, and of few tokens, and their times are explained by a constant, the entries of a plan and the fetches in it, none
of them below 0; every sample counts by its relative error.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from experiments.registry import discover
from experiments.routers.base import FloatArray, exact_counts
from experiments.routers.kit.hot import hot_shares
from experiments.simulator.flows import num_plan_steps, plan_flows
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.runtime.device import Device
from results_schema.atomic import write_text
from results_schema.printing import print_anything
from scripts.bench.planning import NUM_HOT, SKEWS, TOKENS_PER_RANK, ready_policy, sample_plans_us

OUT = Path("conf/simulator/bench.yaml")
#: (world_size, num_experts).
SIZES = ((8, 128), (8, 256), (32, 128), (32, 256), (64, 256))
#: Of a rank in decode, where most policies find nothing to decide.
FEW_TOKENS = 64
#: A system that has its options from a preset plans as the class that it is of.
PRESETS = {"harmoeny_paper": "harmoeny_tokens", "harmoeny_sync": "harmoeny_tokens"}


def samples(cls: type[Policy]) -> Iterator[tuple[float, float, float]]:
    """Yield seconds, entries and fetches of plans of every size and skew."""
    for world_size, num_experts in SIZES:
        for skew, tokens_per_rank in (*((skew, TOKENS_PER_RANK) for skew in SKEWS), (0.0, FEW_TOKENS)):
            shares = hot_shares(skew, np.arange(NUM_HOT), num_experts)
            counts = _counts(shares, world_size, tokens_per_rank)
            policy = ready_policy(cls, shares, world_size)
            placement = policy.place(0, num_experts, world_size)
            placement = policy.update_placement(0, [counts], placement) or placement
            steps = num_plan_steps(plan_flows(policy, counts, placement), counts, placement)
            yield (
                float(np.median(sample_plans_us(policy, counts))) * 1e-6,
                float(world_size * counts.size),
                float(steps),
            )


def _counts(shares: FloatArray, world_size: int, tokens_per_rank: int) -> IntArray:
    return np.stack([exact_counts(shares, tokens_per_rank, 1, np.random.default_rng(r)) for r in range(world_size)])


def fit(measured: FloatArray) -> FloatArray:
    """Return seconds per plan, entry and fetch.

    Args:
        measured: float64 ``[num_samples, 3]``, seconds, entries and fetches.
    """
    seconds = measured[:, :1]
    terms = np.column_stack([np.ones(len(measured)), measured[:, 1:]])
    scale = terms.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(terms / scale / seconds, np.ones(len(measured)))
    fitted: FloatArray = found / scale
    return fitted


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.plan_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file (default: {OUT})")
    out = parser.parse_args().out
    found = {}
    for name, cls in sorted(discover("system")[0].items()):
        measured = np.array(list(samples(cls)))
        found[name] = fit(measured)
        error = np.abs(np.column_stack([np.ones(len(measured)), measured[:, 1:]]) @ found[name] / measured[:, 0] - 1)
        print(f"{name:20} off by {np.median(error):.0%} in the median, {error.max():.0%} at most")
    found |= {preset: found[name] for preset, name in PRESETS.items()}
    lines = [
        f"  {name}: {{plan_s: {base:.2e}, plan_entry_s: {entry:.2e}, plan_step_s: {step:.2e}}}"
        for name, (base, entry, step) in sorted(found.items())
    ]
    core = Device.of(torch.device("cpu")).name
    head = (
        f"# What planning takes, fitted to plans that were timed on one core of a {core}:\n"
        "# python -m scripts.bench.plan_model. Seconds per plan, per entry of its tokens, and per fetch in it.\n"
        "batch_size: {}\nsoftware:\n"
    )
    write_text(out, head + "\n".join(lines) + "\n")
    print(out)


if __name__ == "__main__":
    main()
