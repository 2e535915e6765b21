"""One process measures a run; what a crash leaves holds nobody up; others on the machine are known to both."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from experiments.results.begun import begun
from experiments.results.lock import RunBusyError, hold
from experiments.results.neighbours import Neighbours, registered
from experiments.results.run_folder import LOCK, RunFolder
from results_schema.manifest import Status, read_manifest
from tests.conftest import Load
from tests.experiments.command import Command
from tests.experiments.results.test_kept import STORED
from tests.programs import Programs

_HOLDS = """
import sys, time
from pathlib import Path
from experiments.results.lock import hold
with hold(Path(sys.argv[1]), "run", wait=True):
    print("held", flush=True)
    time.sleep(600)
"""
_MEASURES = """
import sys, time
from experiments.results.neighbours import registered
with registered(sys.argv[1]) as neighbours:
    print("measuring", flush=True)
    time.sleep(600)
"""


class TestLock:
    def test_nobody_else_gets_it_and_the_holder_is_named(self, tmp_path: Path, programs: Programs) -> None:
        with (
            programs.started("-c", _HOLDS, str(tmp_path)) as holder,
            pytest.raises(RunBusyError, match=f"run is being measured by process {holder.pid} on .* since 20"),
        ):
            hold(tmp_path, "run", wait=False).__enter__()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_crash_leaves_no_lock(self, tmp_path: Path, number: signal.Signals, programs: Programs) -> None:
        with programs.started("-c", _HOLDS, str(tmp_path)) as holder:
            holder.signal(number)
            assert holder.wait(60) == -number
        with hold(tmp_path, "run", wait=False):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()

    def test_waits_and_says_for_whom_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("experiments.results.lock._POLL_S", (0.02, 0.02))

        def release(first: ExitStack) -> None:
            time.sleep(0.2)  # in which it looks again several times
            first.close()

        with ExitStack() as first:
            first.enter_context(hold(tmp_path, "run", wait=True))
            thread = threading.Thread(target=release, args=(first,))
            thread.start()
            with hold(tmp_path, "run", wait=True):
                thread.join()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"run: being measured by process {os.getpid()} on ")

    def test_a_removed_folder_is_no_lock(self, tmp_path: Path) -> None:
        with hold(tmp_path, "run", wait=True):
            (tmp_path / LOCK).unlink()
            with hold(tmp_path, "run", wait=False):
                pass

    def test_forgetting_keeps_the_lock(self, tmp_path: Path) -> None:
        with hold(tmp_path, "run", wait=True):
            RunFolder(tmp_path).forget()
            with pytest.raises(RunBusyError):
                hold(tmp_path, "run", wait=False).__enter__()

    def test_a_file_system_without_locks_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with hold(tmp_path, "run", wait=False):
            assert "is on a file system without locks" in capsys.readouterr().err

    def test_what_another_process_finished_meanwhile_is_kept(self, load: Load) -> None:
        point = load(*STORED)
        with begun([point], wait=False) as (run,):
            with pytest.raises(RunBusyError):
                begun([point], wait=False).__enter__()
            run.folder.describe({"inputs": {}})
            run.folder.finish()
        with begun([point], wait=False) as runs:
            assert runs == []
        with begun([load(*STORED, "force=true")], wait=False) as (run,):
            assert read_manifest(point.folder)["status"] == Status.RUNNING


class TestNeighbours:
    @pytest.fixture(autouse=True)
    def own_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        return tmp_path

    def test_alone(self, own_machine: Path) -> None:
        with registered("one") as neighbours:
            assert neighbours is not None
            assert neighbours.met() == []
        assert list((own_machine / "harmoeny-measuring").iterdir()) == []

    def test_both_know_of_each_other(self) -> None:
        with registered("one") as one, registered("two") as two:
            assert one is not None
            assert two is not None
            assert [(other["run"], other["pid"]) for other in one.met()] == [("two", os.getpid())]
            assert [other["run"] for other in two.met()] == ["one"]

    def test_one_that_came_and_went_is_known(self) -> None:
        with registered("one") as one:
            with registered("two"):
                pass
            assert one is not None
            assert [other["run"] for other in one.met()] == ["two"]

    def test_one_that_ended_before_is_not(self) -> None:
        with registered("first"):
            with registered("ended"):
                pass
            with registered("one") as one:
                assert one is not None
                assert [other["run"] for other in one.met()] == ["first"]

    def test_one_that_crashed_before_is_not_and_while_measuring_is(self, own_machine: Path, programs: Programs) -> None:
        def crash() -> None:
            with programs.started("-c", _MEASURES, "crashed") as other:
                other.signal(signal.SIGKILL)
                assert other.wait(60) == -signal.SIGKILL

        crash()
        with registered("one") as one:
            assert one is not None
            assert one.met() == []
            crash()
            assert [other["run"] for other in one.met()] == ["crashed"]
        assert list((own_machine / "harmoeny-measuring").iterdir()) == []

    def test_damaged_entries_do_no_harm(self, own_machine: Path) -> None:
        with registered("one") as one:
            assert one is not None
            (own_machine / "harmoeny-measuring" / "x.json").write_text("[]")
            assert [other["run"] for other in one.met()] == ["unknown"]

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_another_thing_in_its_place_is_left_alone(self, own_machine: Path, kind: str) -> None:
        path, precious = own_machine / "harmoeny-measuring", own_machine / "home" / "precious.json"
        precious.parent.mkdir()
        precious.write_text("")
        if kind == "file":
            path.write_text("")
        else:
            path.symlink_to(precious.parent)
        with registered("one") as one:
            assert one is None
        assert precious.exists()

    def test_the_manifest_lists_them(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, Neighbours(tmp_path / "none", at_start=[{"run": "a", "pid": 1, "since": "now"}]))
        (tmp_path / "manifest.json").write_text('{"status": "running"}')
        folder.finish()
        assert folder.manifest["beside"] == [{"run": "a", "pid": 1, "since": "now"}]


@pytest.mark.ranks
class TestSecondStart:
    def arguments(self, results: Path) -> tuple[str, ...]:
        return ("run.py", *STORED, "rounds=1", f"results_dir={results}")

    def test_waits_then_measures(self, programs: Programs, load: Load, tmp_path: Path) -> None:
        point = load(*STORED, "rounds=1")
        with ExitStack() as held:
            held.enter_context(hold(point.folder, "run", wait=False))
            (point.folder / "precious").write_text("of the first")
            with Command(tmp_path, *self.arguments(tmp_path / "results"), programs=programs) as command:
                command.wait_until(lambda: "waiting for it" in command.output(), 60)
                assert f"being measured by process {os.getpid()} on " in command.output()
                assert not (point.folder / "manifest.json").exists()
                held.close()
                assert command.wait(90) == 0, command.output()
        assert RunFolder(point.folder).is_finished
        assert not (point.folder / LOCK).exists()

    def test_ranks_that_joined_end_at_once(self, programs: Programs, load: Load, tmp_path: Path) -> None:
        point = load(*STORED, "rounds=1", "world_size=1")
        variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
        with hold(point.folder, "run", wait=False):
            words = self.arguments(tmp_path / "results")
            with Command(tmp_path, *words, variables=variables, programs=programs) as command:
                assert command.wait(60) == 1
                (error,) = command.errors()
            assert f"is being measured by process {os.getpid()} on " in error
        assert not (point.folder / "manifest.json").exists()
