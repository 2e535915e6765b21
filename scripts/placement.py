"""Make a placement of experts from recorded routing, and write it for a serving engine.

It is made of all batches together. How good it would be for batches that it has not seen is said, too: made of the
first half, and judged on the second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from baselines.kit.replicas import ReplicatingPolicy
from experiments.registry import discover
from experiments.routing.formats.base import ReadOptions
from experiments.routing.formats.read import read_routing
from experiments.routing.placements import ENGINES, write_placement
from harmoeny.placement import BoolArray, IntArray, place
from results_schema.printing import print_anything


def policy_named(name: str) -> ReplicatingPolicy:
    """Return a policy that places replicas by loads.

    Raises:
        ValueError: there is none of that name.
    """
    found = {n: cls for n, cls in discover("system")[0].items() if issubclass(cls, ReplicatingPolicy)}
    if name not in found:
        raise ValueError(f"--system: {name!r}, must be one of {', '.join(sorted(found))}")
    policy: ReplicatingPolicy = found[name]()
    return policy


def placed(policy: ReplicatingPolicy, load: IntArray, world_size: int) -> list[BoolArray]:
    """Return a placement, by layer bool ``[num_experts, world_size]``.

    Args:
        policy: places.
        load: int64 ``[num_layers, num_experts]``.
        world_size: ranks.
    """
    num_slots = policy.held(load.shape[1], world_size)
    found = []
    for layer, of_layer in enumerate(load):
        present = policy.place(layer, load.shape[1], world_size)
        found.append((policy.rearranged(of_layer, present, num_slots) or present).resident)
    return found


def imbalance(layers: Sequence[BoolArray], load: IntArray) -> float:
    """Return largest over mean load of the ranks, mean over layers; replicas share their expert's load evenly."""
    ratios = []
    for resident, of_layer in zip(layers, load, strict=True):
        ranks = (of_layer[:, None] * resident / resident.sum(axis=1, keepdims=True)).sum(axis=0)
        ratios.append(ranks.max() / ranks.mean() if ranks.any() else 1.0)
    return float(np.mean(ratios))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.placement", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recorded routing of any known format")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the deployment")
    parser.add_argument("--spare-slots", type=int, default=2, help="slots per rank beside an even share (%(default)s)")
    parser.add_argument("--system", default="eplb", help="what places them (%(default)s)")
    parser.add_argument("--to", choices=ENGINES, required=True, help="engine")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--first-layer", type=int, default=0, help="the model's number of its first layer with experts")
    parser.add_argument("--top-k", type=int, help="experts per token, where only counts are recorded")
    parser.add_argument("--num-experts", type=int, help="experts per layer, where files name chosen ones alone")
    given = parser.parse_args(arguments)
    try:
        for name, least in (("ranks", 1), ("spare_slots", 0)):
            if getattr(given, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(given, name)}, must be at least {least}")
        options = ReadOptions(num_experts=given.num_experts, top_k=given.top_k)
        trace = read_routing(given.files, options, ("", ""))
        policy = policy_named(given.system).with_spare_slots(given.spare_slots, trace.num_experts, given.ranks)
        counts = trace.counts.sum(axis=2)
        whole = placed(policy, counts.sum(axis=0), given.ranks)
        write_placement(whole, given.to, given.out, given.first_layer)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    home = place("contiguous", trace.num_experts, given.ranks).home
    alone = [home[:, None] == np.arange(given.ranks)] * trace.num_layers
    before, after = (imbalance(layers, counts.sum(axis=0)) for layers in (alone, whole))
    print(f"imbalance:  {before:.2f} with experts in blocks, {after:.2f} with this placement")
    half = trace.num_batches // 2
    if half:
        seen, unseen = counts[:half].sum(axis=0), counts[half:].sum(axis=0)
        print(f"            {imbalance(placed(policy, seen, given.ranks), unseen):.2f} on batches that it has not seen")
    slots = int(whole[0].sum())
    print(f"slots:      {slots} for {trace.num_experts} experts, {slots // given.ranks} per rank")
    print(f"layers:     {trace.num_layers} with experts; a model of another number cannot take it")
    print(f"{given.to}: {ENGINES[given.to].use.format(path=given.out, spare=slots - trace.num_experts)}")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
