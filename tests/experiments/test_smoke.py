"""The smoke experiment on real ranks, read back from its result folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.programs import Programs
from tests.smoke import SmokeRun, run_smoke

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(240)]

SYSTEMS = ["harmoeny", "static_ep", "even_split", "drop"]
WORLD_SIZE, BATCH_SIZE, SEQ_LEN, ROUNDS = 2, 2, 32, 3
SKEWS = [0.0, 0.9]
PHASES = ["route_s", "metadata_s", "plan_s", "dispatch_s", "compute_s", "combine_s"]


@pytest.fixture(params=["smoke", "joined_smoke"], ids=["started", "joined"])
def run(request: pytest.FixtureRequest) -> SmokeRun:
    made: SmokeRun = request.getfixturevalue(request.param)
    return made


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def test_every_point_is_finished_and_checked(run: SmokeRun) -> None:
    assert [_manifest(folder)["point"]["router.skew"] for folder in run.folders] == SKEWS
    for folder in run.folders:
        manifest = _manifest(folder)
        assert (manifest["status"], manifest["backend"], manifest["world_size"]) == ("finished", "gloo", WORLD_SIZE)
        assert manifest["started_at"] <= manifest["ended_at"]
        assert list(manifest["systems"]) == SYSTEMS
        assert {name for name, check in manifest["checks"].items() if check["passed"]} == set(SYSTEMS)
        assert max(check["relative_error"] for check in manifest["checks"].values()) <= 1e-4
        assert {name for name, check in manifest["checks"].items() if check["kept_share"] < 1} <= {"drop"}


def test_no_assignment_is_lost(run: SmokeRun) -> None:
    for folder in run.folders:
        layers = pd.read_parquet(folder / "layers.parquet")
        total = layers.groupby(["iteration", "layer"])[["num_assignments", "executed_tokens", "dropped_tokens"]].sum()
        assert (total["executed_tokens"] + total["dropped_tokens"] == total["num_assignments"]).all()
        assert (layers.loc[layers["system"] != "drop", "dropped_tokens"] == 0).all()
        # Top-1 routing: an encoder layer sees every token, the decoder one per sequence.
        expected = {0: BATCH_SIZE * SEQ_LEN, 1: BATCH_SIZE * SEQ_LEN, 2: BATCH_SIZE}
        assert (layers["num_assignments"] == layers["layer"].map(expected)).all()


def test_systems_are_interleaved_on_the_same_batches(run: SmokeRun) -> None:
    for folder in run.folders:
        iterations = pd.read_parquet(folder / "iterations.parquet").sort_values("iteration")
        assert iterations["iteration"].tolist() == list(range(ROUNDS * len(SYSTEMS)))
        order = [rows["system"].tolist() for _, rows in iterations.groupby("round")]
        assert [sorted(systems) for systems in order] == [sorted(SYSTEMS)] * ROUNDS
        assert order[0] == order[1][::-1] == order[2], "every round goes the other way than the one before"
        layers = pd.read_parquet(folder / "layers.parquet")
        shape = layers.groupby(["system", "round", "layer"])["rank"].agg(list)
        assert len(shape) == len(SYSTEMS) * ROUNDS * 3
        assert (shape.map(sorted).map(tuple) == tuple(range(WORLD_SIZE))).all()


def test_measures_follow_their_definitions(run: SmokeRun) -> None:
    for folder in run.folders:
        layers, iterations = (pd.read_parquet(folder / f"{name}.parquet") for name in ("layers", "iterations"))
        np.testing.assert_allclose(layers[PHASES].sum(axis=1), layers["layer_s"], atol=1e-7)
        assert (layers[PHASES] >= 0).all(axis=None)
        assert (layers.groupby(["iteration", "layer"])["idle_s"].min() == 0).all(), "the last rank waits for nobody"
        assert (iterations["input_tokens"] == WORLD_SIZE * BATCH_SIZE * SEQ_LEN).all()
        restoring_s = layers.groupby(["iteration", "rank"])["restore_s"].sum().groupby("iteration").max()
        taken_s = iterations["latency_s"].clip(lower=iterations["iteration"].map(restoring_s))
        rate = iterations["input_tokens"] / taken_s
        np.testing.assert_allclose(iterations["throughput_tokens_per_s"], rate)
        assert (iterations["ttft_s"] <= iterations["latency_s"]).all()
        of_rank = layers.groupby(["iteration", "rank"])["layer_s"].sum()  # the others may wait for the last to start
        assert (of_rank.groupby("iteration").min() < iterations.set_index("iteration")["latency_s"]).all()


def test_only_balancing_systems_stay_balanced_when_routing_is_skewed(run: SmokeRun) -> None:
    layers = pd.read_parquet(run.folders[1] / "layers.parquet")
    load = layers[layers["layer"] < 2].groupby(["system", "iteration", "layer"])["executed_tokens"]
    imbalance = (load.max() / load.mean()).groupby("system").median()
    assert imbalance["static_ep"] > 1.7, "nine of ten tokens go to one expert"
    assert imbalance["harmoeny"] < 1.1
    assert imbalance["even_split"] < 1.1


def test_both_points_are_measured_in_the_same_rounds(run: SmokeRun) -> None:
    groups = [_manifest(folder)["group"] for folder in run.folders]
    assert groups[0] == groups[1]
    assert groups[0]["mirrored"]
    assert groups[0]["run_ids"] == [folder.name for folder in run.folders]
    assert len({_manifest(folder)["calibration"]["token_s"] for folder in run.folders}) == 1, "calibrated once"


def test_both_ways_measure_the_same_thing(smoke: SmokeRun, joined_smoke: SmokeRun) -> None:
    columns = ["round", "iteration", "layer", "rank", "num_assignments", "executed_tokens"]
    for one, other in zip(smoke.folders, joined_smoke.folders, strict=True):
        assert one.name == other.name
        tables = (pd.read_parquet(folder / "layers.parquet") for folder in (one, other))
        started, joined = (rows.loc[rows["system"] == "static_ep", columns] for rows in tables)
        pd.testing.assert_frame_equal(started, joined)


def test_the_sweep_is_reported(run: SmokeRun) -> None:
    (sweep,) = run.results.glob("smoke/sweeps/*")
    table = pd.read_csv(sweep / "table.csv")
    assert set(table["system"]) == set(SYSTEMS)
    assert (sweep / "figures" / "skew_sweep.png").read_bytes().startswith(b"\x89PNG")
    assert list(sweep.glob("wandb/offline-run-*")), "logged offline"
    for folder in run.folders:
        summary = json.loads((folder / "summary.json").read_text())
        measured = pd.read_parquet(folder / "iterations.parquet").groupby("system")["throughput_tokens_per_s"].median()
        for name in SYSTEMS:
            assert summary["systems"][name]["throughput_tokens_per_s"]["median"] == pytest.approx(measured[name])
        assert list(folder.glob("wandb/offline-run-*")), "logged offline"


def test_nothing_is_left_behind(run: SmokeRun) -> None:
    assert run.stray == set()
    assert not list(run.results.rglob(".*")), "temporary files"


def test_the_output_is_calm(smoke: SmokeRun) -> None:
    lines = smoke.output.splitlines()
    assert not [line for line in lines if "warn" in line.lower() or "error" in line.lower()]
    # Other tests may measure meanwhile, and in a new clone it compiles; then a line says so.
    now_and_then = ("on this machine too", "compiling for this machine")
    steps = [
        line
        for line in lines
        if line.startswith("smoke, 2 points: ") and not any(said in line for said in now_and_then)
    ]
    assert len(steps) == 2 + 2 * len(SYSTEMS) + 1 + ROUNDS, "one line per step, of rank 0 alone"
    assert [line for line, count in Counter(steps).items() if count > 1] == []
    assert "smoke, 2 points: checking harmoeny at skew=0.9 (2 of 2)" in steps
    assert steps[-1] == "smoke, 2 points: round 3 of 3"
    assert len([line for line in lines if line.startswith("smoke: 2 points, 2 to run together; results in ")]) == 1


def test_a_finished_sweep_is_kept(smoke: SmokeRun, programs: Programs) -> None:
    before = {path: path.stat().st_mtime_ns for folder in smoke.folders for path in folder.rglob("*")}
    again = run_smoke(smoke.results.parent, programs=programs)
    assert again.output.startswith("smoke: 2 points, 0 to run")
    assert "round" not in again.output.partition("skew")[0]
    assert {path: path.stat().st_mtime_ns for folder in smoke.folders for path in folder.rglob("*")} == before
