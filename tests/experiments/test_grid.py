"""A small grid from the command line: the points that are checked are those that run, in several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.programs import Programs

COMMAND = (
    "run.py", "experiment=grid", "hydra.sweeper.points=1", "hydra.launcher.processes=2", "rounds=2",
    "machine=dgx1_v100,dgx_h100", "model=switch_128_layers,qwen3_30b_a3b_layers", "seq_len=64,128",
    "router=uniform,moving", "spare_slots=0,2", "system=[harmoeny,static_ep,eplb,ultraep]",
)  # fmt: skip


@pytest.mark.timeout(300)
def test_a_small_grid_covers_all_pairs_and_resumes(programs: Programs, tmp_path: Path) -> None:
    words = (*COMMAND, f"results_dir={tmp_path}")
    first = programs.run(*words, timeout_s=240)
    assert first.returncode == 0, first.stderr
    (sweep_dir,) = (tmp_path / "grid" / "sweeps").iterdir()
    sweep = json.loads((sweep_dir / "sweep.json").read_text())
    table = pd.read_csv(sweep_dir / "table.csv")
    assert "missing" not in first.stdout
    assert set(table["run_id"]) == set(sweep["run_ids"])
    assert 4 <= len(sweep["run_ids"]) <= 12
    points = {frozenset(values.items()) for values in sweep["values"]}
    assert {frozenset((values | {"router": "uniform"}).items()) for values in sweep["values"]} <= points
    for one in sweep["axes"]:
        for other in sweep["axes"]:
            if one != other:
                assert len(table[[one, other]].drop_duplicates()) == table[one].nunique() * table[other].nunique()
    assert set(table["backend"]) == {"simulator"}
    ratios = pd.read_csv(sweep_dir / "figures" / "grid.csv")
    ours = table[table["system"] == "harmoeny"]
    assert sorted(ratios["ratio"]) == sorted(ours["throughput_ratio_to_best_baseline"])
    assert ratios["throughput_ratio_to_no_skew"].gt(0).all(), "every point has one with even routing"
    again = programs.run(*words, timeout_s=240)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before, kept") == len(sweep["run_ids"])


def test_ranks_are_not_measured_beside_each_other(programs: Programs, tmp_path: Path) -> None:
    words = ("run.py", "experiment=smoke", "hydra/launcher=cores", f"results_dir={tmp_path}")
    found = programs.run(*words, timeout_s=100)
    assert found.returncode == 2
    assert "hydra/launcher: 'cores', must be basic with backend=ranks" in found.stderr
