"""Points that the same ranks measure together: each gets what it gets alone, and no fault of one is another's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from baselines.static_ep import StaticEP
from experiments.compose.dry_run import describe_runs
from experiments.compose.groups import announce, is_measured, left_of_group, note_measured
from experiments.compose.job import _run_here
from experiments.launch.local import RanksError
from experiments.launch.rank import run_rank
from experiments.point.group import grouped
from experiments.point.point import Point
from experiments.results.begun import BegunRun, begun
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from tests.conftest import Load
from tests.experiments.runs import begin
from tests.ranks import run_ranks

RANKS = 2
COMMON = (
    "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=32", "model.num_experts=8",
    "model.vocab_size=1024", "batch_size=4", "seq_len=64", "rounds=3", "dataset=random", "device=cpu",
    "wandb.mode=disabled", f"world_size={RANKS}",
)  # fmt: skip
#: Systems that learn from calibration or from batch to batch, and systems that do not; no plan hangs on measured costs.
SYSTEMS = ("system=[harmoeny_paper,static_ep,eplb,eplb_lp,exflow,drop]", "systems.harmoeny_paper.threshold=4")
#: What the seed alone decides; times and what depends on calibrated times are left out.
COUNTED = [
    "system", "round", "iteration", "layer", "rank", "num_assignments", "executed_tokens", "sent_tokens",
    "dropped_tokens", "num_active_experts",
]  # fmt: skip


def _measure(rank: int, runs: list[BegunRun], tokens: TokenFile) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    run_rank(runs, tokens)


def skewed(load: Load, *overrides: str, skews: Sequence[float] = (0.0, 0.5, 0.9)) -> list[Point]:
    return [load(*COMMON, *overrides, f"router.skew={skew}") for skew in skews]


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_a_point_gets_in_a_group_what_it_gets_alone(load: Load, tmp_path: Path) -> None:
    together = skewed(load, *SYSTEMS)
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
    run_ranks(RANKS, _measure, tmp_path / "together", begin(*together), prepare_point(together[0]))
    alone = load(*COMMON, *SYSTEMS, "router.skew=0.9", "tag=alone")
    run_ranks(RANKS, _measure, tmp_path / "alone", begin(alone), prepare_point(alone))
    tables = {}
    for point in (*together, alone):
        tables[point.folder] = pd.read_parquet(point.folder / "layers.parquet")
        manifest = RunFolder(point.folder).manifest
        assert manifest["status"] == "finished"
        assert all(check["passed"] for check in manifest["checks"].values())
    pd.testing.assert_frame_equal(tables[together[2].folder][COUNTED], tables[alone.folder][COUNTED])
    routing = [pd.read_parquet(point.folder / "routing.parquet") for point in (together[2], alone)]
    assert [row.tolist() for row in routing[0]["counts"]] == [row.tolist() for row in routing[1]["counts"]]
    groups = [RunFolder(point.folder).manifest["group"] for point in together]
    assert groups[0] == groups[1] == groups[2]
    assert RunFolder(alone.folder).manifest["group"]["run_ids"] == [alone.run_id]


@dataclass(kw_only=True)
class WrongWhenSkewed(StaticEP):
    """Static EP that loses the tokens of an expert which has more than half of them."""

    name: ClassVar[str] = "wrong_when_skewed"
    description: ClassVar[str] = "wrong on purpose"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        of_expert = counts.sum(axis=0)
        if of_expert.max() > of_expert.sum() / 2:
            plan.tokens[:, int(of_expert.argmax()), :] = 0
        return plan


def _with_wrong(points: Sequence[Point], *, only: bool = False) -> list[Point]:
    for point in points:
        if only:
            point.systems.clear()
        point.systems["wrong"] = WrongWhenSkewed()
    return list(points)


@pytest.mark.parametrize("only", [False, True], ids=["beside another", "alone"])
def test_a_system_that_fails_at_one_point_fails_there_only(
    load: Load, monkeypatch: pytest.MonkeyPatch, only: bool
) -> None:
    monkeypatch.setenv("RANK", "0")
    points = _with_wrong(skewed(load, "system=[static_ep]", "world_size=1", skews=(0, 0.9)), only=only)
    run_rank(begin(*points), prepare_point(points[0]))
    even, skew = (RunFolder(point.folder).manifest for point in points)
    assert even["status"] == "finished"
    assert "wrong" in even["systems"]
    assert even["failed_systems"] == {}
    assert list(skew["failed_systems"]) == ["wrong"]
    assert skew["status"] == ("failed" if only else "finished")
    for point, names in zip(points, (set(even["systems"]), set() if only else {"static_ep"}), strict=True):
        path = point.folder / "iterations.parquet"
        assert (set(pd.read_parquet(path)["system"]) if path.exists() else set()) == names


class _Backend:
    """Finishes some runs of a group and fails then."""

    def __init__(self, num_finished: int) -> None:
        self.num_finished, self.asked = num_finished, list[str]()

    def run(self, runs: Sequence[BegunRun], tokens: TokenFile | None) -> None:  # noqa: ARG002
        self.asked = [run.point.run_id for run in runs]
        for run in runs[: self.num_finished]:
            run.folder.describe({"inputs": run.point.inputs()})
            run.folder.finish()
        if self.num_finished < len(runs):
            raise RanksError("a rank was killed")


def test_a_crash_leaves_what_was_finished_and_only_the_rest_is_measured_again(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = skewed(load, "system=[static_ep]")
    backend = _Backend(1)
    monkeypatch.setattr("experiments.compose.job.backend_of", lambda _: backend)
    with pytest.raises(RanksError):
        _run_here(points)
    states = [RunFolder(point.folder).manifest for point in points]
    assert [state["status"] for state in states] == ["finished", "failed", "failed"]
    assert states[2]["error"] == "a rank was killed"
    kept = (points[0].folder / "manifest.json").read_bytes()
    monkeypatch.setattr("experiments.compose.job.backend_of", lambda _: _Backend(3))
    assert _run_here(points) == points[1:]
    assert (points[0].folder / "manifest.json").read_bytes() == kept
    now = [RunFolder(point.folder).manifest["group"] for point in points]
    assert now[0]["id"] != now[1]["id"] == now[2]["id"], "rounds of another day are no pairs"
    assert now[1]["run_ids"] == [point.run_id for point in points[1:]]


def test_only_what_differs_in_routing_alone_is_one_group(load: Load) -> None:
    points = [
        load(*COMMON, "router.skew=0"),
        load(*COMMON, "router.skew=0.5", "trace.record=routing.parquet"),
        load(*COMMON, "router=zipf"),
        load(*COMMON, "router=model"),
        load(*COMMON, "router.skew=0", "seed=1"),  # of the weights too
        load(*COMMON, "router.skew=0", "batch_size=2"),
        load(*COMMON, "router.skew=0", "tag=beside"),
    ]
    assert grouped(points) == [points[:4], [points[4]], [points[5]], [points[6]]]
    simulated = [load(*COMMON, "backend=simulator", "hardware=dgx1_v100", f"router.skew={s}") for s in (0, 0.5)]
    assert grouped(simulated) == [[simulated[0]], [simulated[1]]]


def test_simulations_pair_by_their_group_whenever_they_ran(load: Load) -> None:
    points = [load(*COMMON, "backend=simulator", "hardware=dgx1_v100", f"router.skew={s}") for s in (0, 0.5)]
    other = load(*COMMON, "backend=simulator", "hardware=dgx_a100", "router.skew=0")
    ids = []
    for point in (*points, other):
        begin(point)
        ids.append(RunFolder(point.folder).manifest["group"]["id"])
    assert ids[0] == ids[1] != ids[2]


def test_a_process_measures_nothing_twice(load: Load) -> None:
    points = skewed(load, "force=true")
    announce(points)
    assert left_of_group(points[1]) == points
    note_measured(points[:2])
    assert left_of_group(points[1]) == points[2:]
    assert [is_measured(point) for point in points] == [True, True, False]
    other = load(*COMMON, "router.skew=0.3")
    assert left_of_group(other) == [other], "asked for by nobody else"


def test_two_processes_that_measure_the_same_hold_folders_in_one_order(load: Load) -> None:
    points = skewed(load)
    with begun(points[::-1], wait=False) as runs:
        assert [run.point.run_id for run in runs] == [point.run_id for point in points[::-1]], "the sweep's order"
        assert all((point.folder / ".lock").exists() for point in points)
    assert not any((point.folder / ".lock").exists() for point in points)


def test_a_dry_run_says_what_is_measured_together(load: Load) -> None:
    points = [*skewed(load), load(*COMMON, "batch_size=2", "router.skew=0")]
    values: list[dict[str, Any]] = [{"router.skew": skew} for skew in (0, 0.5, 0.9)]
    *_, together, total = describe_runs(points, [*values, {"batch_size": 2}])
    assert together == "together, interleaved by rounds: router.skew=0; router.skew=0.5; router.skew=0.9"
    assert total.startswith("single: 4 points, 4 to run in 2 groups, time unknown")
