"""What makes resuming safe: nothing half written has a final name, and only a finished run counts as one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title
from results_schema.atomic import atomic_path
from results_schema.files import SWEEP_DIR_VARIABLE
from tests.experiments.command import ROOT

_KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from results_schema.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half a")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.programs
@pytest.mark.parametrize("old", [None, "the old content"])
def test_a_crash_while_writing_never_shows(tmp_path: Path, old: str | None) -> None:
    target = tmp_path / "layers.parquet"
    if old is not None:
        target.write_text(old)
    command = [sys.executable, "-c", _KILLED_WHILE_WRITING, str(target)]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    assert (target.read_text() if target.exists() else None) == old
    (left,) = (path for path in tmp_path.iterdir() if path != target)
    assert left.name.startswith(".")
    RunFolder(tmp_path).forget()
    assert list(tmp_path.iterdir()) == [], "resuming begins with a clean folder"


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "summary.json") as temporary:
            temporary.write_text("half a")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [None, "", '{"status": "fini', "[]", "null", "{}", '{"status": "running"}', '{"status": "failed"}'],
)
def test_only_a_finished_run_counts_as_finished(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "layers.parquet").write_bytes(b"complete, as far as one can see")
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert not RunFolder(tmp_path).is_finished
    (tmp_path / "manifest.json").write_text(json.dumps({"status": "running"}))
    RunFolder(tmp_path).finish()
    assert RunFolder(tmp_path).is_finished


def test_a_point_is_called_by_what_the_sweep_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"router.skew": 0, "model.top_k": 1}, {"router.skew": 0.9, "model.top_k": 2}]
    (tmp_path / "sweep.json").write_text(json.dumps({"run_ids": ["one", "two"], "values": values}))
    monkeypatch.delenv(SWEEP_DIR_VARIABLE, raising=False)
    assert point_title("two") == "two", "no sweep"
    monkeypatch.setenv(SWEEP_DIR_VARIABLE, str(tmp_path))
    assert point_title("two") == "skew=0.9, top_k=2 (2 of 2)"
    assert point_title("other") == "other"
