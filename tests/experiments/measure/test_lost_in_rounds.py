"""A system that passes its check and executes less in a measured round has no numbers either."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from baselines.static_ep import StaticEP
from experiments.launch.rank import run_rank
from experiments.measure.measured import lost_in_rounds
from experiments.results.begun import BegunRun
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from tests.conftest import Load
from tests.experiments.runs import begin
from tests.ranks import run_ranks

_PLANS_BEFORE_FAULT = 6
COMMON = (
    "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=32", "model.num_experts=4",
    "model.vocab_size=1024", "batch_size=2", "seq_len=16", "rounds=8", "dataset=random", "device=cpu",
    "requests.arrivals=poisson", "requests.rate_per_s=500", "requests.per_round=4", "world_size=2",
    f"+systems.forgetful._target_={__name__}.Forgetful",
)  # fmt: skip


@dataclass(kw_only=True)
class Forgetful(StaticEP):
    """Static EP, which executes one assignment less once the checks are over."""

    name: ClassVar[str] = "forgetful"
    description: ClassVar[str] = "loses assignments on purpose"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    num_plans: int = field(default=0, init=False)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        self.num_plans += 1
        plan = super().plan(counts, placement)
        if self.num_plans <= _PLANS_BEFORE_FAULT:
            return plan
        tokens = plan.tokens.copy()
        tokens[tuple(index[0] for index in tokens.nonzero())] -= 1
        return replace(plan, tokens=tokens)


def _measure(rank: int, runs: list[BegunRun], tokens: TokenFile) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    run_rank(runs, tokens)


def measured(load: Load, folder: Path, systems: str) -> tuple[dict[str, Any], Path]:
    point = load(*COMMON, f"system={systems}")
    run_ranks(2, _measure, folder, begin(point), prepare_point(point))
    return json.loads((point.folder / "manifest.json").read_text()), point.folder


@pytest.mark.ranks
def test_it_is_left_out_of_all_tables(load: Load, tmp_path: Path) -> None:
    manifest, folder = measured(load, tmp_path, "[static_ep,drop]")
    assert manifest["status"] == "finished"
    assert set(manifest["systems"]) == {"static_ep", "drop"}, "one that is said to drop is no failure"
    assert "assignments of measured rounds were not executed, first in round" in manifest["failed_systems"]["forgetful"]
    assert not manifest["checks"]["forgetful"]["passed"]
    for table in ("layers", "iterations", "requests"):
        rows = pd.read_parquet(folder / f"{table}.parquet")
        assert set(rows["system"]) == {"static_ep", "drop"}, table
        assert set(rows["round"]) == set(range(8))


@pytest.mark.ranks
def test_alone_it_leaves_no_result(load: Load, tmp_path: Path) -> None:
    manifest, folder = measured(load, tmp_path, "[]")
    assert (manifest["status"], manifest["error"]) == ("failed", "no system passed its check")
    assert not list(folder.glob("*.parquet"))


def test_rows_by_hand() -> None:
    layers = pd.DataFrame(
        [
            {"system": system, "round": round_index, "dropped_tokens": dropped}
            for system, round_index, dropped in [
                ("a", 0, 0), ("b", 0, 0), ("b", 1, 2), ("b", 2, 1), ("c", 0, -1), ("c", 0, 1), ("d", 0, 5),
            ]
        ]
    )  # fmt: skip
    assert lost_in_rounds(layers, {"a", "b", "c"}) == {
        "b": "3 assignments of measured rounds were not executed, first in round 1",
        "c": "2 assignments of measured rounds were not executed, first in round 0",
    }
