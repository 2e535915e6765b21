"""Ranks that stop answering: whatever was done to them, the run ends soon, names them and leaves no process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from experiments.launch.watch import Pulse, Watch
from experiments.text.prepare import prepare_point
from tests.conftest import Load
from tests.experiments.command import Command
from tests.experiments.sweeps import STOP_S, FaultySweep, stalled_rank
from tests.programs import Programs

TIMEOUT_S = 6
#: What may pass from the end of ``timeout_s`` to that of the last process.
GRACE_S = 5


@pytest.fixture(scope="module")
def sweep(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> FaultySweep:
    return FaultySweep(tmp_path_factory.mktemp("stopped"), programs, f"timeout_s={TIMEOUT_S}")


@contextmanager
def _stalled(sweep: FaultySweep) -> Iterator[tuple[Command, list[int]]]:
    """Yield a command in mid-run and the process ids of its ranks."""
    with sweep.stalled() as (command, rank_1):
        fork_server = psutil.Process(rank_1).parent()
        assert fork_server is not None
        ranks = sorted(process.pid for process in fork_server.children())
        assert len(ranks) == 2
        assert ranks[1] == rank_1
        yield command, ranks


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_a_stopped_rank_ends_the_run_and_is_named(sweep: FaultySweep) -> None:
    with _stalled(sweep) as (command, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        assert command.remaining(TIMEOUT_S + GRACE_S) == set(), command.output()
        assert command.wait(STOP_S) == 1
        (error,) = command.errors()
        assert f"rank 1 (pid {ranks[1]}, a stopped process) did not answer any more" in error
    assert sweep.unfinished()["status"] == "failed"
    assert str(sweep.unfinished()["error"]) in error
    assert len(sweep.finished()) == 1


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(sweep: FaultySweep) -> None:
    with _stalled(sweep) as (command, ranks):
        assert command.remaining(TIMEOUT_S + GRACE_S) == set(), command.output()
        assert command.wait(STOP_S) == 1
        (error,) = command.errors()
        assert f"rank 1 (pid {ranks[1]}) kept the others waiting for more than timeout_s ({TIMEOUT_S})" in error


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_ctrl_c_ends_a_stopped_rank_too(sweep: FaultySweep) -> None:
    with _stalled(sweep) as (command, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        command.signal(signal.SIGINT)
        assert command.remaining(GRACE_S) == set(), command.output()
        assert command.wait(STOP_S) == 130


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_a_stopped_rank_of_torchrun_is_named_by_the_other(programs: Programs, tmp_path: Path, load: Load) -> None:
    timeout_s = 15  # it also has to cover the time by which one rank starts later than the other,
    prepare_point(load("experiment=smoke"))  # and the text
    sweep = FaultySweep(tmp_path, programs, f"timeout_s={timeout_s}")
    with sweep.start("stall", "-m", "torch.distributed.run", "--nproc-per-node", "2") as command:
        rank_1 = stalled_rank(sweep, command)
        os.kill(rank_1, signal.SIGSTOP)
        assert command.remaining(timeout_s + GRACE_S) == set(), command.output()
        (error,) = [line for line in command.output().splitlines() if line.startswith("error:")]
        assert f"lost rank 1 (pid {rank_1}), a stopped process (timeout_s is {timeout_s})" in error
    assert f"rank 1 (pid {rank_1}), a stopped process" in str(sweep.unfinished()["error"])


def _ends(pid: int) -> bool:
    """Tell whether a child ends soon; it is left for its parent to collect."""
    end = time.monotonic() + 5
    while (ended := psutil.Process(pid).status() == psutil.STATUS_ZOMBIE) is False and time.monotonic() < end:
        time.sleep(0.02)
    return ended


def _stop(pid: int) -> None:
    """Stop a child, and wait until it is: the signal takes its time on a busy machine."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 5
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.programs
class TestWatch:
    """The launcher's view, without ranks: processes that only exist."""

    @pytest.fixture
    def pids(self) -> Iterator[list[int]]:
        processes = [psutil.Popen(["sleep", "60"]) for _ in range(3)]
        yield [process.pid for process in processes]
        for process in processes:
            process.kill()
            process.wait()

    def _watch(self, pids: list[int]) -> tuple[Pulse, Watch]:
        pulse = Pulse(len(pids))
        for rank, pid in enumerate(pids):
            pulse._values[3 * rank] = pid
        return pulse, Watch(pulse, timeout_s=5)

    def _look(self, pulse: Pulse, watch: Watch, seconds: float, alive: list[int]) -> None:
        for _ in range(round(seconds / 0.2)):
            for rank in alive:
                pulse._values[3 * rank + 1] += 1
            watch._look(0.2)

    def test_ranks_that_answer_are_left_alone(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        self._look(pulse, watch, 60, [0, 1, 2])
        assert watch.verdict is None
        assert all(psutil.pid_exists(pid) for pid in pids)

    def test_a_silent_rank_is_killed_when_its_time_is_up(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        self._look(pulse, watch, 4.6, [0, 2])
        assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
        self._look(pulse, watch, 0.8, [0, 2])
        assert watch.verdict == f"rank 1 (pid {pids[1]}) did not answer any more (timeout_s is 5)"
        assert _ends(pids[1])
        assert all(psutil.Process(pids[rank]).status() != psutil.STATUS_ZOMBIE for rank in (0, 2))

    def test_the_one_that_is_silent_is_to_blame_where_others_wait(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        self._look(pulse, watch, 2, [0, 1])
        pulse.waited_in_vain(0)
        self._look(pulse, watch, 1.2, [0, 1])
        assert watch.verdict is not None
        assert watch.verdict.startswith(f"rank 2 (pid {pids[2]}) did not answer")

    def test_all_that_did_not_wait_are_named_where_nobody_is_silent(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        pulse.waited_in_vain(0)
        self._look(pulse, watch, 1.2, [0, 1, 2])
        assert watch.verdict is not None
        assert watch.verdict.startswith(f"rank 1 (pid {pids[1]}) and rank 2 (pid {pids[2]}) kept the others waiting")

    def test_where_all_waited_nobody_is_to_blame(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        for rank in range(3):
            pulse.waited_in_vain(rank)
        self._look(pulse, watch, 3, [0, 1, 2])
        assert watch.verdict is None

    def test_a_rank_that_ended_is_not_silent(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        os.kill(pids[1], signal.SIGKILL)
        assert _ends(pids[1])
        self._look(pulse, watch, 20, [0, 2])
        assert watch.verdict is None

    def test_all_that_are_stopped_are_named_also_where_one_was_later(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        _stop(pids[1])
        self._look(pulse, watch, 4, [0, 2])
        _stop(pids[2])
        self._look(pulse, watch, 1.4, [0])
        assert watch.verdict == (
            f"rank 1 (pid {pids[1]}, a stopped process) and rank 2 (pid {pids[2]}, a stopped process) did not answer "
            "any more (timeout_s is 5)"
        )
        assert _ends(pids[1])
        assert _ends(pids[2])
        assert psutil.Process(pids[0]).status() != psutil.STATUS_ZOMBIE

    def test_what_was_told_to_end_while_it_is_stopped_is_killed(self, pids: list[int]) -> None:
        pulse, watch = self._watch(pids)
        _stop(pids[0])
        self._look(pulse, watch, 1, [0, 1, 2])
        assert psutil.Process(pids[0]).status() == psutil.STATUS_STOPPED, "it may go on later"
        os.kill(pids[0], signal.SIGTERM)
        self._look(pulse, watch, 0.2, [0, 1, 2])
        assert _ends(pids[0])

    def test_a_clock_that_goes_back_hides_no_silence(self, pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        _, watch = self._watch(pids)
        looks: list[float] = []
        monkeypatch.setattr(watch, "_look", looks.append)
        begin, jump_s = time.monotonic, [0.0]
        monkeypatch.setattr("experiments.launch.watch.time.monotonic", lambda: begin() + jump_s[0])
        with watch:
            time.sleep(0.5)
            jump_s[0] = -3600.0
            time.sleep(0.7)
        assert len(looks) >= 3
        assert all(0 <= seconds <= 1.25 for seconds in looks)

    def test_a_busy_machine_on_which_looks_are_late_takes_no_longer(
        self, pids: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, watch = self._watch(pids)
        clock = count(step=1.0)  # a second passes from one look to the next
        looks = iter([False] * 7 + [True])
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(watch, "_over", SimpleNamespace(wait=lambda _: next(looks)))
        watch._run()
        assert watch.verdict is not None
        assert all(f"pid {pid}" in watch.verdict for pid in pids)

    def test_nothing_is_silent_before_ranks_began(self) -> None:
        pulse = Pulse(2)
        watch = Watch(pulse, timeout_s=5)
        self._look(pulse, watch, 60, [])
        assert watch.verdict is None
