"""Start the ranks of a group of points on this machine through torchelastic, and say why they ended if they failed."""

from __future__ import annotations

import inspect
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import elastic_launch

from experiments.launch.host import host_config, stay_on_this_host
from experiments.launch.mps import MpsError, shared_gpus
from experiments.launch.rank import run_rank
from experiments.launch.temporary import temporary_folder
from experiments.launch.watch import Pulse, Watch
from experiments.results.begun import BegunRun
from experiments.results.run_folder import RunError
from experiments.text.tokens import TokenFile
from harmoeny.dependencies import require
from results_schema.atomic import write_error

#: Temporary files of a rank: why it failed, for torchelastic and for PyTorch, and sockets.
_FILES_PER_RANK = 4
#: What torchelastic answers with an exception while ranks run.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class RanksError(RunError):
    """A rank ended in error; the message is the first cause."""


class InterruptedRun(BaseException):
    """A signal stopped the run; no error, so that nobody who handles errors goes on in spite of it.

    Attributes:
        signal: which.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"interrupted by {number.name}")
        self.signal = number


def launch(runs: Sequence[BegunRun], tokens: TokenFile) -> None:
    """Measure a group of points on ``world_size`` new processes and wait for them.

    Rank 0 keeps this process's output, the others write to ``logs`` in the first run's folder.

    Args:
        runs: of the group's points; rank 0 writes their results.
        tokens: their text.

    Raises:
        RanksError: a rank failed; all others were stopped.
        InterruptedRun: this process was told to stop; all ranks were stopped.
    """
    check_torchelastic()
    point, logs_folder = runs[0].point, runs[0].folder.path / "logs"
    shutil.rmtree(logs_folder, ignore_errors=True)
    quiet = dict.fromkeys(range(1, point.options.world_size), Std.ALL)
    pulse = Pulse(point.options.world_size)
    watch = Watch(pulse, point.options.timeout_s)
    try:
        with ExitStack() as held:
            held.enter_context(_signal_handlers_kept())
            errors_folder = held.enter_context(temporary_folder("harmoeny-ranks-"))
            _check_room(errors_folder, point.options.world_size)
            held.enter_context(shared_gpus(point.options.ranks_per_gpu, point.options.gpu_sharing))
            held.enter_context(watch)
            logs = _Logs(str(logs_folder), quiet, errors_folder)
            preload = "experiments.launch.preload"
            config = host_config(point.options.world_size, point.device_type, "ranks", preload, logs)
            _silence_torchelastic()
            elastic_launch(config, _entry)(runs, tokens, pulse)
    except ChildFailedError as error:
        silent = watch.verdict and f"{watch.verdict}; all ranks were stopped; logs in {logs_folder}"
        raise RanksError(silent or _first_cause(error, logs_folder)) from error
    except MpsError as error:
        raise RanksError(str(error)) from error
    except json.JSONDecodeError as error:
        raise RanksError(f"a rank failed and {tempfile.gettempdir()} has no room for its reason (TMPDIR=)") from error
    except OSError as error:
        path = Path(error.filename or logs_folder)
        if path.is_relative_to(tempfile.gettempdir()) and not path.is_relative_to(point.options.results_dir):
            remedy = "make room on that disk, or set TMPDIR to another folder"
            raise RanksError(f"TMPDIR: {str(path)!r} cannot be written ({error.strerror}); {remedy}") from error
        raise RanksError(str(write_error(path, error))) from error
    except SignalException as error:
        raise InterruptedRun(error.sigval) from error


def _check_room(folder: Path, world_size: int) -> None:
    """Make as many temporary files as ranks need, and remove them: without room for them a rank dies while it starts.

    Raises:
        OSError: there is none.
    """
    files = [folder / f"room-{i}" for i in range(_FILES_PER_RANK * world_size)]
    try:
        for file in files:
            file.write_bytes(b"room")
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@cache
def check_torchelastic() -> None:
    """Refuse releases of PyTorch in which logs and error files are arranged in another way.

    Raises:
        DependencyError: ``DefaultLogsSpecs`` or ``LogsDest`` is not as :class:`_Logs` needs it.
    """
    arguments = list(inspect.signature(DefaultLogsSpecs.reify).parameters)
    holds = arguments == ["self", "envs"] and any(field.name == "error_files" for field in fields(LogsDest))
    require("torch", "DefaultLogsSpecs.reify must take envs and return LogsDest with error_files", holds=holds)


class _Logs(DefaultLogsSpecs):
    """Logs in one folder, and why ranks failed in another: the disk of the results may be full by then."""

    def __init__(self, log_dir: str, redirects: dict[int, Std], errors_folder: Path) -> None:
        super().__init__(log_dir=log_dir, redirects=redirects)
        self._errors_folder = errors_folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Say where everything goes."""
        logs = super().reify(envs)
        for rank, environment in envs.items():
            logs.error_files[rank] = environment["TORCHELASTIC_ERROR_FILE"] = str(self._errors_folder / f"{rank}.json")
        return logs


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers in the end: torchelastic leaves its own behind, which raise even without ranks."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence_torchelastic() -> None:
    # It logs the traceback of every failure at length; what the user needs of it is in our own error and in the logs.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic.", "torch.multiprocessing.")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _entry(runs: Sequence[BegunRun], tokens: TokenFile, pulse: Pulse) -> None:
    try:
        _be_rank(runs, tokens, pulse)
    except Exception:  # noqa: BLE001
        # It is recorded. PyTorch would write it to a temporary file, too, which nobody removes.
        sys.exit(1)


@record
def _be_rank(runs: Sequence[BegunRun], tokens: TokenFile, pulse: Pulse) -> None:
    rank = int(os.environ["RANK"])
    pulse.start(rank)
    # Ctrl-C reaches the whole process group: a rank just goes, even from inside a collective, and the launcher talks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    stay_on_this_host()
    run_rank(runs, tokens, on_timeout=lambda: pulse.waited_in_vain(rank))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()


def _end_with_launcher() -> None:
    """Wait until the launcher is gone, however it went: nobody else would stop this rank."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None, "ranks are started by multiprocessing"
    launcher.join()
    os._exit(1)


def _first_cause(error: ChildFailedError, logs_folder: Path) -> str:
    rank, failure = error.get_first_failure()
    message: Any = failure.message  # declared as text, but a dict where the rank wrote an error file
    see = f"logs in {logs_folder}"
    if failure.exitcode < 0:
        reason = f"was killed by {signal.Signals(-failure.exitcode).name}"
    elif isinstance(message, dict):
        reason = "failed: " + " ".join(message["message"].split())
        trace = logs_folder / "traceback.txt"
        with suppress(OSError):
            trace.write_text(message["extraInfo"]["py_callstack"], encoding="utf-8")
            see = f"see {trace}"
    else:
        reason = f"ended with exit status {failure.exitcode}"
    return f"rank {rank} (pid {failure.pid}) {reason}; all ranks were stopped; {see}"
