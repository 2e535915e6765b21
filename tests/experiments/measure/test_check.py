"""The comparison with the dense model: right systems pass, and every planted defect is refused by name."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.static_ep import StaticEP
from experiments.measure.check import check_systems
from experiments.point.point import Point
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.policy import Policy
from tests.conftest import Load
from tests.experiments.measure.defects import BadPlans, Defective
from tests.experiments.runs import set_up
from tests.ranks import run_ranks

COMMON = (
    "dataset=random", "batch_size=2", "seq_len=16", "rounds=1", "wandb.mode=disabled", "device=cpu",
)  # fmt: skip
STACK = ("model=moe_stack", "model.hidden_size=16", "model.intermediate_size=32", "model.vocab_size=1024", *COMMON)


def _checks(rank: int, points: list[tuple[Point, TokenFile]]) -> list[dict[str, dict[str, Any]]]:
    os.environ["LOCAL_RANK"] = str(rank)
    found = []
    for point, tokens in points:
        bench = set_up(point, tokens)
        found.append(check_systems(bench))
        bench.rig.close()
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


#: What is said of every defect that one rank has too.
DIFFERS = r"rank {}, MoE layer \d: the output differs from that of its experts by [\d.e-]+ of its scale, allowed 1e-04"
REASONS = {
    "lost assignment": r"rank \d: (1 of 64|2 of 128) assignments were not executed",
    "experts swapped": DIFFERS.format(r"\d"),
    "unscaled weights": DIFFERS.format(r"\d"),
    "one rank wrong": DIFFERS.format("LAST"),
    "not a number": r"rank \d: \d+ of \d+ numbers of the output are NaN or infinite",
    "rounded to bf16": DIFFERS.format(r"\d"),
    "output in bf16": rf"rank \d: the output is bfloat16, the dense model's float32|{DIFFERS.format('0')}",
}
PLANS = {
    "loses tokens": r"rank \d, MoE layer 0: plan.tokens: assignments lost at \[src, expert\] = \[\d, \d\]",
    "executes twice": r"rank \d, MoE layer 0: plan.tokens: more assignments than counted at \[src, expert\] = ",
}
PLANS_OF_TWO = PLANS | {
    "executes without weights": r"rank \d, MoE layer 0: plan.fetch: executed without weights at \[expert, rank\] = ",
    "differs on rank 1": "rank 1, MoE layer 0: the plan is not that of rank 0",
    "raises on rank 1": "rank 1, MoE layer 0: KeyError: 'no such expert'",
}
MODELS = {
    "stack": (*STACK, "model.top_k=2", "router.skew=0.5"),
    "qwen3": ("model=qwen3_tiny", *COMMON, "router.skew=0.5"),
}


def defective(load: Load, model: str, world_size: int) -> tuple[Point, TokenFile]:
    point = load(*MODELS[model], "system=static_ep", f"world_size={world_size}")
    plans = PLANS if world_size == 1 else PLANS_OF_TWO
    systems: dict[str, Policy] = {
        "right": Defective(),
        **{name: Defective(defect=name) for name in REASONS},
        **{name: BadPlans(defect=name) for name in plans},
        "static_ep": StaticEP(),  # one that is checked after all that failed
    }
    point = replace(point, systems=systems)
    return point, prepare_point(point)


def assert_refused(checks: dict[str, dict[str, Any]], world_size: int) -> None:
    assert {name for name, check in checks.items() if check["passed"]} == {"right", "static_ep"}, checks
    for name, reason in (REASONS | (PLANS if world_size == 1 else PLANS_OF_TWO)).items():
        assert re.match(reason.replace("LAST", str(world_size - 1)), checks[name]["reason"]), (name, checks[name])


@pytest.mark.parametrize("model", MODELS)
def test_every_planted_defect_is_refused_by_name_on_one_rank(load: Load, model: str) -> None:
    point, tokens = defective(load, model, 1)
    with torch.inference_mode():
        bench = set_up(point, tokens)
        checks = check_systems(bench)
        bench.rig.close()
    assert_refused(checks, 1)


@pytest.mark.ranks
def test_every_planted_defect_is_refused_by_name_on_two_ranks(load: Load, tmp_path: Path) -> None:
    ranks = run_ranks(2, _checks, tmp_path, [defective(load, model, 2) for model in MODELS])
    assert ranks[0] == ranks[1], "all ranks agree, or they would not go on together"
    for checks in ranks[0]:
        assert_refused(checks, 2)


def test_weights_of_another_type_than_was_asked_for_are_refused(load: Load) -> None:
    point = load(*STACK, "model.dtype=bfloat16", "system=static_ep", "world_size=1")
    with torch.inference_mode():
        bench = set_up(point, prepare_point(point))
        assert check_systems(bench)["static_ep"]["passed"]
        bench.point = load(*STACK, "model.dtype=float32", "system=static_ep", "world_size=1")
        check = check_systems(bench)["static_ep"]
        bench.rig.close()
    assert not check["passed"]
    assert check["reason"] == "the experts' weights are bfloat16, must be float32 (model.dtype)"


def test_a_dense_model_that_is_no_number_is_refused(load: Load) -> None:
    point = load(*STACK, "system=static_ep", "world_size=1")
    with torch.inference_mode():
        bench = set_up(point, prepare_point(point))
        for weights in bench.model.experts[0].weights.values():
            weights.fill_(float("nan"))
        reason = check_systems(bench)["static_ep"]["reason"]
        bench.rig.close()
    assert "numbers of the dense model's output are NaN or infinite" in reason
