"""Results of an earlier revision (dd5384a) are still read, reported and resumed; none of their files changes.

The runs in tests/data/stored_run were made by the commands below. An option that is added to the configuration rightly
gives runs another name: then give these the new one, in the names of folders and wherever it stands in their files.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.data.load import load_run, run_folders
from analysis.data.summary import summarise
from results_schema.files import SUMMARY
from results_schema.tables import TABLES
from tests.programs import ROOT, Programs

STORED = ROOT / "tests" / "data" / "stored_run"
SMALL = (
    "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=16", "model.num_experts=4",
    "model.vocab_size=1024", "batch_size=1", "seq_len=8", "wandb.mode=disabled", "dataset=random", "rounds=2",
    "router.skew=0,0.5", "tag=stored", "device=cpu", "world_size=2",
)  # fmt: skip
COMMANDS = {
    "ranks": ("system=[harmoeny,static_ep,eplb]", "warmup_rounds=1"),
    "simulator": (
        "system=[harmoeny,static_ep]",
        "backend=simulator",
        "simulator=runtime",
        "hardware=dgx1_v100",
        "hardware.round_spread=0",  # as this machine was described then, and:
        "hardware.early_s=0",
    ),
}
THROUGHPUT = "throughput_tokens_per_s"
NUM_SYSTEMS = {"ranks": 3, "simulator": 2}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "results"))


def run(programs: Programs, results: Path, backend: str) -> str:
    """Run the command that made the stored points again, to its end."""
    done = programs.run("run.py", "experiment=skew_sweep", *SMALL, *COMMANDS[backend], f"results_dir={results}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def folders(results: Path, backend: str) -> list[Path]:
    """Return the folders of a backend's points, by skew."""
    found = sorted(path for path in run_folders(results) if path.name.startswith("on-") == (backend == "simulator"))
    assert len(found) == 2
    return found


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_kept(folder: Path, stored: dict[Path, bytes]) -> None:
    """All files are byte for byte the stored ones, but for what the summary says beside."""
    now, summary = files(folder), folder / SUMMARY
    assert {path: now[path] for path in now if path != summary} == {p: stored[p] for p in stored if p != summary}
    assert_contains(json.loads(now[summary]), json.loads(stored[summary]))
    assert_throughput_counts_restores(json.loads(now[summary]), folder)


@pytest.mark.parametrize("backend", COMMANDS)
def test_the_same_command_keeps_all_points_and_reports_them(results: Path, backend: str, programs: Programs) -> None:
    before = {folder: files(folder) for folder in folders(results, backend)}
    output = run(programs, results, backend)
    assert "skew_sweep: 2 points, 0 to run" in output
    assert output.count("finished before, kept") == 2
    for folder, stored in before.items():
        assert_kept(folder, stored)

    run_ids = [folder.name for folder in folders(results, backend)]
    (sweep,) = (
        s.parent for s in results.glob("*/sweeps/*/sweep.json") if json.loads(s.read_text())["run_ids"] == run_ids
    )
    table = pd.read_csv(sweep / "table.csv")
    assert len(table) == 2 * NUM_SYSTEMS[backend]
    assert table["throughput_tokens_per_s"].notna().all()
    assert "report.html" in output
    assert (sweep / "report.html").stat().st_size > 1000
    assert (sweep / "figures" / "skew_sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backend", COMMANDS)
def test_its_tables_and_numbers_are_read_as_they_were_stored(backend: str) -> None:
    for folder in folders(STORED, backend):
        loaded = load_run(folder)
        assert len(loaded.systems) == NUM_SYSTEMS[backend]
        for table in TABLES:
            frame = getattr(loaded, table.name)
            if not (folder / table.file).exists():
                assert frame is None
                continue
            stored = pd.read_parquet(folder / table.file)
            same = [name for name in stored.columns if name != THROUGHPUT]
            pd.testing.assert_frame_equal(frame[same], stored[same])
            assert list(stored.columns) == [column.name for column in table.columns if column.added is None]
            assert set(frame.columns) == set(table.column_names)
        stored_summary = json.loads((folder / "summary.json").read_text())
        assert_contains(json.loads(json.dumps(summarise(loaded))), stored_summary)
        assert_throughput_counts_restores(summarise(loaded), folder)
        assert summarise(loaded)["exchange"] == "collective", "there was no other"


def assert_throughput_counts_restores(summary: dict[str, Any], folder: Path) -> None:
    """Throughput is of today's definition, whatever it was when it was stored."""
    rows, layers = (pd.read_parquet(folder / f"{name}.parquet") for name in ("iterations", "layers"))
    restoring_s = layers.groupby(["iteration", "rank"])["restore_s"].sum().groupby("iteration").max()
    tokens_per_s = rows["input_tokens"] / rows["latency_s"].clip(lower=rows["iteration"].map(restoring_s))
    for name, of_system in tokens_per_s.groupby(rows["system"]):
        assert summary["systems"][name][THROUGHPUT]["median"] == pytest.approx(of_system.median(), rel=1e-12)


def assert_contains(now: Any, stored: Any) -> None:
    """All that was stored is said now, with the same values; more may be said, but no percentile of a few requests.

    Throughput is defined in another way since then.
    """
    if not isinstance(stored, dict):
        assert now == stored
        return
    for name, value in stored.items():
        if name.startswith("throughput_"):
            assert name in now
            continue
        if name not in now and re.search(r"ttft_p\d+_s$", name):
            assert isinstance(value, dict)
            continue
        assert_contains(now[name], value)


def test_a_point_that_an_earlier_revision_left_unfinished_is_run_again(results: Path, programs: Programs) -> None:
    kept, unfinished = folders(results, "simulator")
    before, stored = files(kept), pd.read_parquet(unfinished / "layers.parquet")
    manifest = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps(manifest | {"status": "running", "ended_at": None}))
    assert "skew_sweep: 2 points, 1 to run" in run(programs, results, "simulator")
    assert_kept(kept, before)
    layers = load_run(unfinished).layers
    # All but what this machine's own time to plan is part of.
    counted = [name for name, dtype in layers.dtypes.items() if dtype == "int64" and name in stored]
    pd.testing.assert_frame_equal(layers[["system", *counted]], stored[["system", *counted]])
