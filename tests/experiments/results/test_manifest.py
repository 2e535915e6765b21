import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from experiments.results.manifest import new_manifest, now
from experiments.results.run_folder import RunFolder
from harmoeny.runtime.device import Device
from tests.conftest import ROOT, Load


def test_says_what_runs_where_and_on_what(load: Load) -> None:
    point = load("router.skew=0.5", "seed=3", "system=[harmoeny,drop]", "world_size=1")
    manifest = json.loads(json.dumps(new_manifest(point)))
    assert manifest["run_id"] == point.run_id
    assert manifest["status"] == "running"
    assert manifest["ended_at"] is None
    assert abs((datetime.now(UTC) - datetime.fromisoformat(manifest["started_at"])).total_seconds()) < 100
    assert (manifest["seed"], manifest["world_size"]) == (3, 1)
    assert manifest["point"] == {"router": "skew", "router.skew": 0.5, "router.num_hot": 1}
    assert {name: (s["exact"], s["baseline"]) for name, s in manifest["systems"].items()} == {
        "harmoeny": (True, False),
        "drop": (False, True),
    }
    assert manifest["packages"]["torch"] == version("torch")
    assert manifest["host"]["python"] == sys.version.split()[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert manifest["git"]["revision"] == head.stdout.strip()


def test_without_git_there_is_no_revision(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert new_manifest(load())["git"] == {"revision": None, "dirty": None}


def test_only_a_finished_run_counts_as_finished(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path).is_finished
    for status, expected in {"running": False, "failed": False, "finished": True}.items():
        (tmp_path / "manifest.json").write_text(json.dumps({"status": status}))
        assert RunFolder(tmp_path).is_finished is expected
    whole = (tmp_path / "manifest.json").read_text()
    for damaged in (whole[:-5], "", "[]", "null", "{}", "\0"):
        (tmp_path / "manifest.json").write_text(damaged)
        assert not RunFolder(tmp_path).is_finished


def test_times_order_as_text() -> None:
    assert now() <= now()
    assert datetime.fromisoformat(now()).utcoffset() is not None


def test_processor_has_a_name() -> None:
    name = Device.of(torch.device("cpu")).name
    assert name.startswith("CPU ")
    assert len(name) > len("CPU ")
