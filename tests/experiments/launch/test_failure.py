"""Real runs that are killed, broken and interrupted in mid-run. One sweep of two points goes through all of it."""

from __future__ import annotations

import os
import signal
import time

import pandas as pd
import pytest

from tests.experiments.sweeps import STOP_S, FaultySweep
from tests.programs import Programs

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def sweep(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> FaultySweep:
    return FaultySweep(tmp_path_factory.mktemp("failure"), programs)


def test_a_killed_rank_stops_all_others_and_is_named(sweep: FaultySweep) -> None:
    with sweep.stalled() as (command, rank_1):
        assert len(command.processes()) >= 3, "the launcher and two ranks are alive"
        begin = time.monotonic()
        os.kill(rank_1, signal.SIGKILL)
        assert command.remaining(STOP_S) == set()
        assert time.monotonic() - begin < STOP_S
        assert command.wait(STOP_S) == 1
        (error,) = command.errors()
        assert f"rank 1 (pid {rank_1}) was killed by SIGKILL" in error
        assert command.output().rstrip().endswith(error), "the cause is the last thing that one reads"
    assert sweep.unfinished()["status"] == "failed"
    assert f"rank 1 (pid {rank_1}) was killed by SIGKILL" in str(sweep.unfinished()["error"])


def test_finished_points_stay_readable(sweep: FaultySweep) -> None:
    (folder,) = sweep.finished()
    layers = pd.read_parquet(folder / "layers.parquet")
    assert (layers["executed_tokens"] > 0).any()
    assert set(layers["system"]) == {"static_ep", "faulty"}
    assert len(pd.read_parquet(folder / "iterations.parquet")) == 2 * 3, "two systems, three rounds"


def test_the_first_cause_is_the_exception_of_the_rank_that_raised(sweep: FaultySweep) -> None:
    before = sweep.finished()
    with sweep.start("raise") as command:
        assert command.wait(90) == 1
        assert command.remaining() == set()
        (error,) = command.errors()
        assert "rank 1 (pid " in error
        assert "failed: RuntimeError: broken on purpose" in error
    (trace,) = sweep.results.rglob("traceback.txt")
    assert 'raise RuntimeError("broken on purpose")' in trace.read_text()
    assert sweep.finished() == before


@pytest.mark.parametrize(
    ("number", "group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
    ids=["ctrl-c", "sigint to the launcher", "sigterm to the launcher"],
)
def test_an_interrupted_run_leaves_no_rank(
    sweep: FaultySweep, number: signal.Signals, group: bool, status: int
) -> None:
    before = sweep.finished()
    with sweep.stalled() as (command, _):
        command.signal(number, group=group)
        assert command.remaining(STOP_S) == set(), command.output()
        assert command.wait(STOP_S) == status, command.output()
        assert command.errors() == []
        assert command.output().splitlines()[-1].startswith("interrupted:")
    assert sweep.unfinished()["error"] == f"interrupted by {number.name}"
    assert sweep.finished() == before


def test_ranks_end_with_a_launcher_that_is_killed(sweep: FaultySweep) -> None:
    before = sweep.finished()
    with sweep.stalled() as (command, _):
        command.signal(signal.SIGKILL)
        assert command.remaining(STOP_S) == set()
    assert sweep.unfinished()["status"] == "running", "nobody was left to say more, and it is not taken for finished"
    assert sweep.finished() == before


def test_the_same_command_does_only_what_is_missing(sweep: FaultySweep) -> None:
    before = sweep.finished()
    with sweep.start(None) as command:
        assert command.wait(90) == 0, command.output()
        assert command.remaining() == set()
        output = command.output()
    assert "2 points, 1 to run" in output
    assert "(1 of 2): finished before" in output
    assert "(2 of 2): round 3 of 3" in output
    after = sweep.finished()
    assert len(before) == 1
    assert len(after) == 2
    assert {folder: after[folder] for folder in before} == before, "no file of the first point was touched"
