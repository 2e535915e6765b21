"""Benches and predictions that the pages show, with tiny sizes: they end, and print or write what they say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from scripts import example_trace, predict
from scripts.bench import exchange, placement, planning, simulator


def test_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BUDGETS_US", {(2, 8): 1e9})
    for name, value in {"_SAMPLING_S": 0.0, "_MIN_SAMPLES": 1, "TOKENS_PER_RANK": 64}.items():
        monkeypatch.setattr(planning, name, value)
    assert planning.main(["--json", str(tmp_path / "timings.json")]) == 0
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert {"harmoeny", "eplb", "static_ep"} <= {t["policy"] for t in timings}
    assert min(t["median_us"] for t in timings) > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # who never places anew has no mean
def test_placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "SIZES": ((2, 8),),
        "LARGE": (4, 8),
        "_NUM_BATCHES": 40,
        "_NUM_BATCHES_OF_LARGE": 40,
        "TOKENS_PER_RANK": 64,
    }
    for name, value in values.items():
        monkeypatch.setattr(placement, name, value)
    assert placement.main(["--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert "eplb" in {r["policy"] for r in found["replacements"]}
    assert "exflow" in {f["policy"] for f in found["fits"]}


def test_simulator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"WORLD_SIZES": (8,), "NUM_LAYERS": 2, "TOKENS_PER_RANK": 64, "LIMIT_S": 1e9, "LIMIT_PLACING_S": 1e9}
    for name, value in (values | {"LIMIT_GIB": 1e9}).items():
        monkeypatch.setattr(simulator, name, value)
    monkeypatch.setattr(sys, "argv", ["simulator"])
    simulator.main()
    assert "256 experts x 2 layers" in capsys.readouterr().out


@pytest.mark.ranks
def test_exchange(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(exchange, "best_device_type", lambda: "cpu")
    words = "--world-size 2 --rounds 3 --tokens 16 --experts 2 --hidden-size 8"
    monkeypatch.setattr(sys, "argv", ["exchange", *words.split()])
    exchange.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"^2 ranks, CPU .*: dispatch \+ combine .* put / collective \d\.\d\d \[", printed)


def test_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, points = predict._SWEEPS["paper_gpus"]
    tiny = [*shared, "rounds=1", "batch_size=1", "seq_len=8"]
    monkeypatch.setattr(predict, "_SWEEPS", {"paper_gpus": (tiny, points[:1])})
    monkeypatch.setattr(sys, "argv", ["predict", "--out", str(tmp_path)])
    predict.main()
    rows = pd.read_csv(tmp_path / "paper_gpus.csv")
    assert {"harmoeny", "static_ep"} <= set(rows["system"])
    assert (rows["throughput_sequences_per_s"] > 0).all()


def test_the_example_trace_is_the_one_that_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = example_trace.OUT
    monkeypatch.setattr(sys, "argv", ["example_trace", "--out", str(tmp_path / "trace.parquet")])
    example_trace.main()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trace.parquet"), pd.read_parquet(shipped))
