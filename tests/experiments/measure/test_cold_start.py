"""Systems that learn meet the first measured batch unprepared: no check, warm-up or calibration showed it to them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from baselines.eplb import EPLB
from experiments.launch.rank import run_rank
from experiments.measure.batch import make_batch, shared_text
from experiments.point.point import Point
from experiments.results.begun import BegunRun
from experiments.routers.base import CALIBRATION_BATCH, WARM_UP_BATCH, RoutingRequest
from experiments.simulator.backend import Simulator
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.placement import IntArray
from tests.conftest import Load
from tests.experiments.runs import begin
from tests.ranks import run_ranks

RANKS = 2
COMMON = (
    "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=32", "model.num_experts=16",
    "model.vocab_size=1024", "batch_size=4", "seq_len=64", "rounds=3", "dataset=random", "device=cpu",
    "system=[static_ep,eplb,eplb_lp]", "router=dynamic", "router.min_skew=0.6", "router.max_skew=0.9",
    f"world_size={RANKS}",
)  # fmt: skip


def counts_of(point: Point, batch: int, layer: int) -> IntArray:
    o, model = point.options, point.model
    return np.stack([
        point.router.count(RoutingRequest(
            num_tokens=o.batch_size * o.seq_len, num_experts=model.num_experts, top_k=model.top_k, batch=batch,
            layer=layer, rank=rank, seed=o.seed, world_size=o.world_size,
        ))
        for rank in range(o.world_size)
    ])  # fmt: skip


def assert_cold(point: Point) -> None:
    """The first round is that of systems that have seen nothing; the second that of systems that saw the first."""
    layers = pd.read_parquet(point.folder / "layers.parquet")
    for name, policy in point.systems.items():
        assert name == "static_ep" or isinstance(policy, EPLB)
        rows = layers[layers["system"] == name].set_index(["round", "layer", "rank"]).sort_index()
        for layer in sorted(set(layers["layer"])):
            first, second = counts_of(point, 0, layer), counts_of(point, 1, layer)
            placement = policy.place(layer, point.model.num_experts, RANKS)
            assert rows.loc[0, layer]["executed_tokens"].tolist() == policy.plan(first, placement).load().tolist(), name
            assert rows.loc[0, layer]["num_host_fetches"].tolist() == [0] * RANKS, name
            placement = policy.update_placement(layer, [first], placement) or placement
            assert rows.loc[1, layer]["executed_tokens"].tolist() == policy.plan(second, placement).load().tolist(), (
                name
            )


def _measure(rank: int, runs: list[BegunRun], tokens: TokenFile) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    run_rank(runs, tokens)


@pytest.mark.ranks
@pytest.mark.parametrize("warmup_rounds", [0, 2])
def test_round_0_is_a_cold_start_on_ranks(load: Load, tmp_path: Path, warmup_rounds: int) -> None:
    point = load(*COMMON, f"warmup_rounds={warmup_rounds}")
    run_ranks(RANKS, _measure, tmp_path, begin(point), prepare_point(point))
    assert_cold(point)


@pytest.mark.parametrize("warmup_rounds", [0, 2])
def test_round_0_is_a_cold_start_in_the_simulator(load: Load, warmup_rounds: int) -> None:
    point = load(*COMMON, f"warmup_rounds={warmup_rounds}", "backend=simulator", "hardware=dgx1_v100")
    Simulator().run(begin(point), None)
    assert_cold(point)


def test_no_batch_shares_text_or_routing_with_a_measured_one(load: Load) -> None:
    point = load(*COMMON, "system=[static_ep,exflow]")
    tokens, model = prepare_point(point), point.model.build(0)
    assert tokens.num_tokens == (3 + 4 + 1) * RANKS * 4 * 64, "three rounds, four to learn from, one to warm up on"
    indices = [0, 1, 2, *(CALIBRATION_BATCH + i for i in range(4)), WARM_UP_BATCH]
    batches = [make_batch(point, model, tokens, i, rank, torch.device("cpu")) for i in indices for rank in range(RANKS)]
    texts = {tuple(row.tolist()) for batch in batches for row in batch.input_ids}
    assert len(texts) == len(batches) * 4
    assert len({tuple(batch.expert_ids[0].flatten().tolist()) for batch in batches}) == len(batches)
    assert shared_text(point, tokens) == []


@pytest.mark.parametrize(
    ("num_batches", "router", "shared"),
    [
        (8, "router=model", []),
        (7, "router=model", ["warm-up"]),
        (6, "router=model", ["calibration", "warm-up"]),
        (2, "router=model", ["calibration", "warm-up"]),
        (6, "router=skew", ["warm-up"]),  # this routing does not come from the text
    ],
)
def test_a_text_too_short_to_keep_them_apart_is_marked(
    load: Load, tmp_path: Path, num_batches: int, router: str, shared: list[str]
) -> None:
    point = load(*COMMON[:-5], "system=[static_ep,exflow]", router, f"world_size={RANKS}")
    tokens = TokenFile(tmp_path / "none.npy", num_batches * RANKS * 4 * 64, "")
    assert shared_text(point, tokens) == shared
