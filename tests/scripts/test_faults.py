"""The campaign of faults for some rounds, and its checks on what must not pass."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest

from scripts.faults.__main__ import campaign, describe, totals
from scripts.faults.checks import after_fault, left_in_memory, shared_memory
from scripts.faults.fault import FAULTS, Ended, Planted
from scripts.faults.recomputed import differences
from scripts.faults.round import Outcome
from scripts.faults.sweep import SKEWS, TinySweep
from tests.programs import Programs
from tests.smoke import SmokeRun

#: Ranks that are killed, stopped and left alone, and a launcher that is interrupted.
SEED, ROUNDS = 7, 5


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_some_rounds_of_the_campaign_hold(programs: Programs) -> None:
    others = psutil.Process().children(recursive=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as short:  # sockets in it: a path may have 107 bytes
        folder = Path(short)
        outcomes = list(campaign(SEED, rounds=ROUNDS, minutes=None, folder=folder, programs=programs))
        assert len(outcomes) == ROUNDS
        assert [describe(outcome, folder) for outcome in outcomes if outcome.problems] == []
        assert not list(folder.glob("round-*")), "what held is not kept"
    assert set(psutil.Process().children(recursive=True)) <= set(others)


def test_every_fault_has_a_name_of_its_own_and_a_row() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    table = totals([Outcome(0, FAULTS[0].name, struck=True), Outcome(1, FAULTS[1].name, problems=["x"])])
    assert f"| {FAULTS[0].name} | 1 | 1 | 0 | 0 |" in table
    assert f"| {FAULTS[1].name} | 1 | 0 | 1 | 0 |" in table


def test_a_failed_round_says_how_to_repeat_it(tmp_path: Path) -> None:
    text = describe(Outcome(12, "kill a rank", "SIGKILL", struck=True, problems=["a traceback"]), tmp_path)
    assert "a traceback" in text
    assert "python -m scripts.faults --rounds 1 --seed 12" in text
    assert str(tmp_path / "round-12") in text


class TestChecks:
    """Each check refuses what it is for."""

    @pytest.fixture
    def sweep(self, tmp_path: Path) -> TinySweep:
        sweep = TinySweep(tmp_path, "ranks")
        for skew in SKEWS:
            folder = sweep.results / "smoke" / f"skew-skew={skew}-x"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"status": "finished"}))
        return sweep

    def _problems(self, sweep: TinySweep, ended: Ended, **fields: object) -> str:
        planted = Planted("x", [ended], struck=True, statuses=(1,), errors=("disk",), **fields)  # type: ignore[arg-type]
        return "\n".join(after_fault(sweep, planted))

    def test_what_is_right_passes(self, sweep: TinySweep) -> None:
        assert self._problems(sweep, Ended(0, "", set()), before=sweep.finished()) == ""
        assert self._problems(sweep, Ended(1, "error: the disk is full", set())) == ""

    @pytest.mark.parametrize(
        ("ended", "problem"),
        [
            (Ended(0, "error: x", set()), "exit status 0 in spite of"),
            (Ended(1, "error: the disk is full", {7}), r"processes [7] are left"),
            (Ended(1, "error: x", set()), "should be one line"),
            (Ended(1, "error: disk\nerror: disk", set()), "should be one line"),
            (Ended(1, "Traceback (most recent call last):\nerror: disk", set()), "a traceback"),
            (Ended(1, "", set()), "without a word"),
            (Ended(3, "error: disk", set()), "exit status 3"),
        ],
    )
    def test_endings(self, sweep: TinySweep, ended: Ended, problem: str) -> None:
        assert problem in self._problems(sweep, ended)

    def test_a_finished_point_that_changed_or_is_gone(self, sweep: TinySweep) -> None:
        before = sweep.finished()
        first, second = sweep.points().values()
        (first / "manifest.json").write_text(json.dumps({"status": "finished", "x": 1}))
        shutil.rmtree(second)
        problems = self._problems(sweep, Ended(1, "error: disk", set()), before=before)
        assert "is another now" in problems
        assert "does not count any more" in problems

    def test_a_run_that_nobody_runs_and_tables_of_one_that_failed(self, sweep: TinySweep) -> None:
        first, second = sweep.points().values()
        (first / "manifest.json").write_text(json.dumps({"status": "running"}))
        (second / "manifest.json").write_text(json.dumps({"status": "failed", "error": "unheard of"}))
        (second / "layers.parquet").write_text("")
        problems = self._problems(sweep, Ended(1, "error: disk", set()))
        assert "status running, though nobody runs it" in problems
        assert "the screen does not" in problems
        assert "layers.parquet beside a failed run" in problems

    def test_temporary_files(self, sweep: TinySweep) -> None:
        (sweep.temporary / "x").write_text("")
        assert "x is left" in self._problems(sweep, Ended(1, "error: disk", set()))

    def test_shared_memory_without_an_owner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scripts.faults.checks._OTHERS_S", 0)
        before, path = shared_memory(), Path("/dev/shm/harmoeny-test-of-the-campaign")
        path.write_bytes(b"x")
        try:
            assert f"{path} is left in shared memory" in set(left_in_memory(before))
            with path.open():
                assert f"{path} is left in shared memory" not in set(left_in_memory(before))
        finally:
            path.unlink()


@pytest.mark.ranks
def test_a_summary_is_what_the_rows_say_and_nothing_else(smoke: SmokeRun, tmp_path: Path) -> None:
    source = smoke.folders[0]
    exact = tmp_path / "run"
    shutil.copytree(source, exact)
    summary = json.loads((exact / "summary.json").read_text())
    assert [line for line in differences(exact) if "assignments executed" not in line] == []
    summary["systems"]["harmoeny"]["idle_share"]["median"] *= 1.001
    (exact / "summary.json").write_text(json.dumps(summary))
    assert any("harmoeny: idle_share" in line for line in differences(exact))
