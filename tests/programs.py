"""Programs under test, forked from a process that has imported their libraries: a start takes moments, not seconds.

That process is forked off before the first test, so that no test leaves anything in it, and has imported the project's
own modules anew, which nothing has used since, as under a new interpreter; the fork server of a program's ranks
(tests/quick_ranks.py) begins likewise. A program that finds other files imports them itself. Where the interpreter's
start is tested, tests start a real one (subprocess).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import multiprocessing.process
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from tests.quick_ranks import fork_rank_server

ROOT = Path(__file__).resolve().parent.parent
_OWN = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"hydra_plugins"}
#: What run.py comes to import, and its ranks, but for what derives from Hydra's plugins, which it executes anew.
_PRELOAD = (
    "experiments.launch.preload", "experiments.launch.leave",
    "experiments.compose.choices", "experiments.compose.job", "experiments.compose.schema",
    "analysis.report_callback", "analysis.report.finish", "analysis.figures.kit.base",
)  # fmt: skip
#: Where Hydra has plugins of its own.
_PLUGINS = "hydra._internal.core_plugins."
#: Our modules read it when they are imported.
_COMPILED = "NUMBA_CACHE_DIR"
#: Of a launcher around the tests; a program under test is started without one.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MOST_FILES = 4096


@dataclass(frozen=True)
class _Request:
    """What to start; its standard input and outputs and a pipe for its status come beside it."""

    words: tuple[str, ...]
    cwd: Path
    environment: dict[str, str]
    inside: Callable[[], AbstractContextManager[Any]]


class Program:
    """A program that runs.

    Attributes:
        pid: its process id; it is no child of this process, and leads a session and a process group of its own.
    """

    def __init__(self, status: IO[str]) -> None:
        self._status = status
        self._code: int | None = None
        self.pid = int(status.readline())

    def status(self, timeout_s: float = 0.0) -> int | None:
        """Return the exit status, negative for a signal's number; None: it has not ended by then."""
        if self._code is None and select.select([self._status], [], [], timeout_s)[0]:
            self._code = int(self._status.readline())
        return self._code

    def wait(self, timeout_s: float) -> int:
        """Return the exit status, negative for a signal's number.

        Raises:
            AssertionError: it runs for longer, and was killed.
        """
        code = self.status(timeout_s)
        if code is None:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout_s} s")
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it is known to have ended."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        """Ask no more how it ended."""
        self._status.close()


class Programs:
    """Starts programs, from what this process has imported by now; as a context manager it ends what that takes."""

    def __init__(self) -> None:
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        os.waitpid(self._pid, 0)

    def run(
        self,
        *words: str,
        cwd: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
        timeout_s: float = 100,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end.

        Args:
            words: what follows ``python`` on a command line: a script, ``-m`` and a module, or ``-c`` and code, and
                the arguments.
            cwd: where it runs.
            variables: of its environment, beside those of this process.
            inside: makes a context manager that it runs in, such as one of ``tests.small_disk``; it is pickled.
            timeout_s: how long it may take.

        Raises:
            AssertionError: it takes longer.
        """
        with _text_file() as out, _text_file() as err:
            request = _Request(words, cwd, _environment(variables), inside)
            with closing(self._start(request, out.fileno(), err.fileno())) as program:
                code = program.wait(timeout_s)
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(words, code, out.read(), err.read())

    def start(self, *words: str, output: IO[bytes], variables: Mapping[str, str] | None = None) -> Program:
        """Start a program, both outputs of which go to a file; it is to be closed."""
        return self._start(
            _Request(words, ROOT, _environment(variables), nullcontext), output.fileno(), output.fileno()
        )

    @contextlib.contextmanager
    def started(self, *words: str) -> Iterator[Program]:
        """Start a program, wait for its first line, and kill it at the end of the block."""
        request = _Request(words, ROOT, _environment(None), nullcontext)
        read, write = os.pipe()
        with open(read, encoding="utf-8") as out, closing(self._start(request, write, 2)) as program:  # noqa: PTH123  (a pipe)
            os.close(write)
            try:
                assert out.readline()
                yield program
            finally:
                program.signal(signal.SIGKILL)

    def _start(self, request: _Request, out: int, err: int) -> Program:
        """Start a program; the server writes its process id and then its status, a line each."""
        read, write = os.pipe()
        with open(os.devnull) as nothing:  # noqa: PTH123
            socket.send_fds(self._server, [pickle.dumps(request)], [nothing.fileno(), out, err, write])
        os.close(write)
        return Program(open(read, encoding="utf-8"))  # noqa: PTH123


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _environment(variables: Mapping[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    return kept | {"COLUMNS": "200"} | dict(variables or {})


def _serve(requests: socket.socket) -> None:
    """Start what is asked for, and tell how it ended, until nobody is left who could ask."""
    os.closerange(3, requests.fileno())
    os.closerange(requests.fileno() + 1, _MOST_FILES)
    atexit._clear()
    faulthandler.disable()
    logging.root.handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as Python does
    _forget(list(filter(_is_own, sys.modules)))
    loaded = {name: import_module(name) for name in _PRELOAD}
    loaded["analysis.figures.kit.base"].discover()
    _compose_once(loaded["experiments.compose.schema"].register_options)
    running: dict[int, tuple[int, int]] = {}  # by its descriptor: a program's process id, and where its status goes
    asked = [requests]
    while asked or running:
        watched: list[Any] = [*asked, *running]
        ready, _, _ = select.select(watched, [], [])
        for ended in [descriptor for descriptor in ready if descriptor in running]:
            pid, status = running.pop(ended)
            _tell(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(ended)
            os.close(status)
        if requests not in ready:
            continue
        content, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not content:
            asked.clear()  # nobody is left who could ask
            continue
        *streams, status = descriptors
        pid = os.fork()
        if pid == 0:
            _begin(pickle.loads(content), *streams)
        for descriptor in streams:
            os.close(descriptor)
        running[os.pidfd_open(pid)] = pid, status
        _tell(status, pid)


def _compose_once(register_options: Callable[[], None]) -> None:
    """Let tests/quick_hydra.py remember what most programs compose, and Hydra nothing."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.types import RunMode

    state, modules = Singleton.get_state(), dict(sys.modules)
    register_options()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.compose_config("config", [], RunMode.MULTIRUN, with_log_configuration=False)
    Singleton.set_state(state)
    # With plugins that it executes anew, what derives from them has to follow.
    _forget({name for name in sys.modules if name not in modules and (_is_own(name) or name.startswith(_PLUGINS))})


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in _OWN


def _forget(modules: Collection[str]) -> None:
    for name in modules:
        del sys.modules[name]


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(status, f"{number}\n".encode())


def _begin(request: _Request, *streams: int) -> NoReturn:
    """Be a program with these standard streams and no other descriptors."""
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
    os.closerange(3, _MOST_FILES)
    _become(request)


def _become(request: _Request) -> NoReturn:
    """Do what an interpreter does for a command line, and end as it does."""
    code = 1
    try:
        os.setsid()
        if request.cwd != ROOT or request.environment.get(_COMPILED) != os.environ.get(_COMPILED):
            _forget(list(filter(_is_own, sys.modules)))
        os.chdir(request.cwd)
        os.environ.clear()
        os.environ.update(request.environment)
        for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            encoding, lines = request.environment.get("PYTHONIOENCODING", "utf-8"), 1 if name == "stderr" else -1
            setattr(sys, name, open(descriptor, mode, encoding=encoding, buffering=lines))  # noqa: PTH123, SIM115
        _log_to_stderr()
        tempfile.tempdir = None  # it may be another one than before the fork
        multiprocessing.process.ORIGINAL_DIR = str(request.cwd)  # type: ignore[attr-defined]  # for the main script of ranks
        sys.path[:] = [str(request.cwd), *(path for path in sys.path if path and Path(path) != ROOT)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with request.inside():
            fork_rank_server(_exit_status)
            code = _exit_status(request.words)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  (there is nobody to raise it to)
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _log_to_stderr() -> None:
    """Let libraries log to files of this program: others have the descriptors now that handlers of pytest remember."""
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.FileHandler):
            handler.stream = None  # it is opened anew
        elif type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr


def _exit_status(words: tuple[str, ...]) -> int:
    """Execute what the words name as ``__main__``, and return its exit status."""
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        elif words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (as the interpreter does)
        traceback.print_exc()
        return 1
    return 0
