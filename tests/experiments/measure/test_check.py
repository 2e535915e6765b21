"""The comparison with the dense model: right systems pass, and every planted defect is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.console import PointProgress
from experiments.measure.bench import Bench
from experiments.measure.check import check_systems
from experiments.point.point import Point
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.runtime.exchange.comm import Communicator
from tests.conftest import Load
from tests.ranks import run_ranks

COMMON = (
    "dataset=random", "batch_size=2", "seq_len=16", "rounds=1", "wandb.mode=disabled", "device=cpu",
)  # fmt: skip
STACK = ("model=moe_stack", "model.hidden_size=16", "model.intermediate_size=32", "model.vocab_size=1024", *COMMON)


def set_up(point: Point, tokens: TokenFile) -> Bench:
    return Bench.set_up(point, tokens, Communicator(torch.device("cpu")), PointProgress("", 0, enabled=False))


def _checks(rank: int, points: list[tuple[Point, TokenFile]]) -> list[dict[str, dict[str, Any]]]:
    os.environ["LOCAL_RANK"] = str(rank)
    found = []
    for point, tokens in points:
        bench = set_up(point, tokens)
        found.append(check_systems(bench))
        bench.close()
    return found


@pytest.mark.ranks
def test_dropping_systems_pass_at_any_top_k(load: Load, tmp_path: Path) -> None:
    cases = [
        (*STACK, "router.skew=0.9"),
        (*STACK, "model.top_k=2", "router.skew=0.5"),
        (*STACK, "model.top_k=2", "router.num_hot=2", "router.skew=0.9"),
        (*STACK, "model.top_k=4", "router.skew=0.25"),
        (*STACK, "model.top_k=3", "router=zipf"),
        (*STACK, "model.top_k=8", "router=uniform"),
        ("model=qwen3_tiny", *COMMON, "router.skew=0.5"),
        ("model=qwen3_tiny", *COMMON, "+model.architecture.norm_topk_prob=true", "router.skew=0.5"),
        ("model=qwen3_tiny", *COMMON, "model.architecture.num_experts_per_tok=4", "router.skew=0.25"),
        ("model=switch_tiny", *COMMON, "router.skew=0.5"),
    ]
    points = [load(*case, "system=[static_ep,drop,deepspeed_moe_drop]", "world_size=2") for case in cases]
    ranks = run_ranks(2, _checks, tmp_path, [(point, prepare_point(point)) for point in points])
    for case, checks, others in zip(cases, *ranks, strict=True):
        assert checks == others, case
        assert {name for name, check in checks.items() if check["passed"]} == set(checks), (case, checks)
        assert checks["static_ep"]["kept_share"] == 1.0
        if "router=uniform" not in case:
            assert checks["drop"]["kept_share"] < 1.0, case
