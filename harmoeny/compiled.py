"""Compilation of the inner loops, kept on disk where a folder can be written, and with a checksum."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from harmoeny.dependencies import require

P = ParamSpec("P")
R = TypeVar("R")

#: Of a digest of the sources, in names of files.
_STAMP_DIGITS = 12
_DIGEST_BYTES = hashlib.sha256().digest_size
#: As long as another process may take to compile a function before one no longer waits for it, and between looks.
_PATIENCE_S, _LOOK_S = 120.0, 0.02
_held: set[Path] = set()
#: What compiling, or waiting for another process that compiles, may take before somebody is told; machine code that is
#: on disk is there sooner.
_UNNOTICED_S = 3.0


class _Notice:
    """Who is told that compiling takes long, whether somebody was, what it took so far, and since when it goes on."""

    tell: Callable[[], None] | None = None
    told = False
    taken_s = 0.0
    begin_s: float | None = None

    @classmethod
    def look(cls) -> None:
        """Tell, once, if compiling has taken long."""
        going_on_s = 0.0 if cls.begin_s is None else time.monotonic() - cls.begin_s
        if cls.taken_s + going_on_s > _UNNOTICED_S and cls.tell is not None and not cls.told:
            cls.told = True
            cls.tell()


def on_compiling(tell: Callable[[], None]) -> None:
    """Have ``tell`` called where compiling takes seconds: after an installation, or a change of the sources.

    Once in a process: who comes later than that is not told again.
    """
    _Notice.tell = tell


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function with numba when it is first called; it runs without the GIL.

    The machine code is kept in ``$NUMBA_CACHE_DIR``, else in ``__pycache__``, else in the user's cache folder, and of
    several processes one compiles while the others wait. Where none of the folders can be written, or the disk is
    full, every process compiles for itself.
    """
    return _kept(numba.njit(nogil=True)(function), function)


def borrowing(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that makes no array and returns none, nor do those that it calls: it counts no references.

    Counting one takes as long as tens of additions, and numba does it again and again in loops that call
    :func:`inlined` functions. What a caller holds stays as long as the call.
    """
    return _kept(numba.njit(nogil=True, _nrt=False)(function), function)


def _kept(dispatcher: Any, function: Callable[P, R]) -> Callable[P, R]:
    """Return a dispatcher that keeps its function's machine code."""
    require("numba", "functions must have a _cache", holds=hasattr(dispatcher, "_cache"))
    with suppress(RuntimeError):  # numba found no folder that can be written
        dispatcher._cache = _Cache(function)
        dispatcher.compile = _compiled_once(dispatcher.compile, dispatcher._cache.lock)
    dispatcher.compile = _of_any_value(_noticed(dispatcher.compile))
    return cast(Callable[P, R], dispatcher)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a small function into those that call it.

    A call counts a reference to every array that it hands over, which may take longer than what is called.
    """
    return cast(Callable[P, R], numba.njit(nogil=True, inline="always")(function))


class _CheckedFiles(IndexDataCacheFile):  # type: ignore[misc]  # numba ships no types
    """Numba's index and data files with a digest at their ends, and a name for every source and signature.

    A flipped bit in machine code would otherwise be executed: `pickle` does not look. Numba itself numbers the data
    files of all sources and signatures alike and writes the index before them, so that a process beside, or one that
    starts after this one was killed, may execute what an earlier source said.
    """

    def __init__(self, cache_path: str, filename_base: str, source_stamp: str) -> None:
        super().__init__(cache_path, f"{filename_base}-{source_stamp[:_STAMP_DIGITS]}", source_stamp)
        self._every_source = f"{glob.escape(filename_base)}-{'[0-9a-f]' * _STAMP_DIGITS}.*nb[ic]"

    def save(self, key: Any, data: Any) -> None:
        overloads = self._load_index()
        if not overloads:
            self._forget_others()
        name = self._data_name_pattern.replace("{number:d}", hashlib.sha256(repr(key).encode()).hexdigest()[:16])
        self._save_data(name, data)
        self._save_index(overloads | {key: name})

    def _forget_others(self) -> None:
        """Remove the files of other sources; a process that still has those compiles again what it loads late."""
        for path in Path(self._cache_path).glob(self._every_source):
            if not path.name.startswith(self._index_name.removesuffix("nbi")):
                path.unlink(missing_ok=True)

    def _dump(self, obj: object) -> bytes:
        data: bytes = super()._dump(obj)
        return data + hashlib.sha256(data).digest()

    def _load_index(self) -> dict[Any, str]:
        try:
            version = pickle.dumps(self._version, protocol=-1)
            content = Path(self._index_path).read_bytes()
            if not content.startswith(version) or not _is_intact(content[len(version) :]):
                return {}
            return cast(dict[Any, str], super()._load_index())
        except (OSError, AttributeError, ImportError):
            return {}  # of other sources, whose types may be gone

    def _load_data(self, name: str) -> Any:
        if not _is_intact(Path(self._data_path(name)).read_bytes()):
            raise OSError(f"{name} is damaged")  # what numba takes for a missing file
        return super()._load_data(name)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, which is never a reason to fail."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator, name = self._impl.locator, self._impl.filename_base
        self._cache_file = _CheckedFiles(locator.get_cache_path(), name, _source_stamp(function, locator))
        self.lock = Path(locator.get_cache_path(), f"{name}.lock")

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            return  # no room; it is compiled again next time


def _compiled_once(compile_: Callable[[Any], Any], lock: Path) -> Callable[[Any], Any]:
    """Let no other process compile a function meanwhile: once it has the lock, it finds the machine code on disk."""

    def compiled_once(signature: Any) -> Any:
        # In this order, as a function that is compiled may call for another with numba's own lock.
        with global_compiler_lock, _alone(lock):
            return compile_(signature)

    return compiled_once


def _of_any_value(compile_: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compile once for all values of a flag or a number, where numba compiles anew for each that a caller writes down.

    Whoever calls holds the machine code of what it calls, of each.
    """

    def of_any_value(signature: Any) -> Any:
        return compile_(tuple(map(numba.types.unliteral, signature)) if isinstance(signature, tuple) else signature)

    return of_any_value


def _noticed(compile_: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Tell who wants to know, before a function is compiled, that what came before it has taken long."""

    def noticed(signature: Any) -> Any:
        _Notice.look()
        if _Notice.begin_s is not None:  # for another function, which counts what this one takes
            return compile_(signature)
        _Notice.begin_s = time.monotonic()
        try:
            return compile_(signature)
        finally:
            _Notice.taken_s += time.monotonic() - _Notice.begin_s
            _Notice.begin_s = None

    return noticed


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock between processes, or do without it where files cannot be locked, or for too long."""
    if lock in _held:  # a function that calls itself
        yield
        return
    with ExitStack() as held:
        with suppress(OSError):
            file = held.enter_context(lock.open("w"))
            _wait(file.fileno())
        _held.add(lock)
        held.callback(_held.remove, lock)
        yield


def _wait(descriptor: int) -> None:
    """Lock a file, or give up after a while: a child of a process that had it may keep it."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOOK_S)


def _source_stamp(function: Callable[..., Any], locator: Any) -> str:
    """Return a digest of all that a function's machine code may hold.

    Numba looks at the function's own file only. Compiled functions of other files that it calls are part of its machine
    code all the same, and so are constants and types that its module imports.
    """
    digest = hashlib.sha256(repr(locator.get_source_stamp()).encode())
    for path, constants in sorted(_reached(function, {}).items()):
        digest.update(_content(path))
        digest.update(constants.encode())
    return digest.hexdigest()


@cache
def _content(path: str) -> bytes:
    """Return a digest of a file, empty where there is none; once per process, as many functions reach each file."""
    return hashlib.sha256(Path(path).read_bytes()).digest() if Path(path).is_file() else b""


def _reached(function: Callable[..., Any], found: dict[str, str]) -> dict[str, str]:
    """Add the file of a function and those of the compiled functions and types in reach, each with its constants.

    A file that only a type was taken from has none as yet, and is looked at again for a function.
    """
    path = function.__code__.co_filename
    if found.get(path):
        return found
    values = {name: value for name, value in function.__globals__.items() if not name.startswith("__")}
    found[path] = repr(sorted((name, v) for name, v in values.items() if type(v) in (bool, int, float, str)))
    for value in values.values():
        called = getattr(value, "py_func", None)
        if callable(called):
            _reached(called, found)
        elif isinstance(value, type) and issubclass(value, tuple):
            file = getattr(sys.modules.get(value.__module__), "__file__", None)
            found.setdefault(file or value.__module__, "")
    return found


def _is_intact(content: bytes) -> bool:
    data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return hashlib.sha256(data).digest() == digest
