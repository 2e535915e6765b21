from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

from baselines.even_split import EvenSplit
from harmoeny.placement import IntArray, Placement, place
from tests.strategies import batches, even_load, examples

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "harmoeny-paper"


@examples(300)
@given(batch=batches())
def test_loads_and_shares_differ_by_at_most_one(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = EvenSplit().plan(counts, placement)
    assert np.ptp(plan.load()) <= 1
    assert plan.load().max() == even_load(int(counts.sum()), plan.world_size)
    assert (np.ptp(plan.executed(), axis=1) <= 1).all()


@examples()
@given(batch=batches(max_world_size=5, max_experts=6, max_tokens=30))
def test_every_sender_may_deal_from_the_first_rank_on(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    world_size, num_experts = counts.shape
    dealt = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    for expert in range(num_experts):
        for src in range(world_size):
            for i in range(counts[src, expert]):
                dealt[src, expert, i % world_size] += 1
    plan = EvenSplit(deal="per_sender").plan(counts, placement)
    np.testing.assert_array_equal(plan.tokens, dealt)
    plan.validate(counts, placement)


def test_a_deal_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="deal: 'fair', must be one of in_turn, per_sender"):
        EvenSplit(deal="fair").validate()


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the authors' data are not at hand")
def test_loads_of_the_authors_gpus_follow_from_their_routing() -> None:
    case = "router_skew == 0"
    routing = pd.read_csv(REFERENCE / "expert_freq_switch128_skew.csv").query(case)
    loads = pd.read_csv(REFERENCE / "gpu_balance_switch128_policy_skew.csv").query(case)
    loads = loads[loads["scheduling_policy"] == "even_split"]
    both = routing.merge(loads, on=["iteration", "layer_idx"], suffixes=("_expert", ""))
    assert len(both) > 200
    placement = place("contiguous", 128, 8)
    expert_columns = [f"{e}_expert" if e < 8 else str(e) for e in range(128)]
    published = both[[str(rank) for rank in range(8)]].to_numpy()
    for counts, load in zip(both[expert_columns].to_numpy(dtype=np.int64), published, strict=True):
        senders = np.tile(counts // 8, (8, 1))  # all drew the same
        np.testing.assert_array_equal(EvenSplit(deal="per_sender").plan(senders, placement).load(), load)


@examples()
@given(batch=batches(max_world_size=5, max_experts=6, max_tokens=30))
def test_same_as_dealing_one_by_one(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    world_size, num_experts = counts.shape
    dealt = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    ranks = cycle(range(world_size))
    for expert in range(num_experts):
        for src in range(world_size):
            for _ in range(counts[src, expert]):
                dealt[src, expert, next(ranks)] += 1
    np.testing.assert_array_equal(EvenSplit().plan(counts, placement).tokens, dealt)
