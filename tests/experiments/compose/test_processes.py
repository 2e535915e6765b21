import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus

from experiments.compose.processes import CoresLauncher


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jobs only note who ran them; one of name ``fail`` or ``die`` does that."""

    def launch(_: object, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        (name,) = job_overrides[0]
        if name == "fail":
            raise SystemExit(2)
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / f"{initial_job_idx}-{name}").write_text(str(os.getpid()))
        return [JobReturn(status=JobStatus.COMPLETED)]

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    return tmp_path


def test_every_job_runs_once_in_another_process(done: Path) -> None:
    returned = CoresLauncher(3).launch([[f"job{i}"] for i in range(20)], 5)
    assert len(returned) == 20
    assert sorted(path.name for path in done.iterdir()) == sorted(f"{5 + i}-job{i}" for i in range(20))
    assert str(os.getpid()) not in {path.read_text() for path in done.iterdir()}


def test_a_job_that_fails_ends_the_sweep_with_its_status(done: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        CoresLauncher(1).launch([["one"], ["fail"], ["never"]], 0)
    assert caught.value.code == 2
    assert [path.name for path in done.iterdir()] == ["0-one"]


def test_a_process_that_is_killed_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        CoresLauncher(1).launch([["die"]], 0)
    assert caught.value.code == 128 + signal.SIGKILL
    assert "a process of the sweep was ended by signal 9; the same command again resumes" in capsys.readouterr().err


def test_a_number_of_processes_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hydra\.launcher\.processes: 0, must be at least 1, or null"):
        CoresLauncher(0).launch([["one"]], 0)
