"""Which other measurements ran on this machine meanwhile: they take a share of it, and both results have to say so."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.results.manifest import now

_SUFFIX = ".json"


@dataclass(frozen=True)
class Neighbours:
    """The measurements of this machine as one of them sees them; it pickles, for ranks of the same machine.

    Every measurement has a file in one folder of the machine, locked while its process lives. What was there at the
    start and not locked had ended before; what comes later ran meanwhile, even if it has ended since.

    Attributes:
        folder: with the files.
        known: names of those that were there at the start, and the own one.
        at_start: what those of them say that were running.
    """

    folder: Path
    known: frozenset[str] = frozenset()
    at_start: list[dict[str, Any]] = field(default_factory=list)

    def met(self) -> list[dict[str, Any]]:
        """Return all that ran meanwhile until now: ``run``, ``pid`` and ``since`` (UTC, ISO 8601) of each."""
        later = [_content(path) for path in _entries(self.folder) if path.name not in self.known]
        return [*self.at_start, *later]


@contextmanager
def registered(run: str) -> Iterator[Neighbours | None]:
    """Be known as a measurement of this machine, and know the others.

    Args:
        run: what others will call this one.

    Yields:
        The neighbours; None where the machine's folder for temporary files cannot be used.
    """
    try:
        folder = _folder()
        file, own = _enter(folder, run)
    except OSError:
        yield None
        return
    try:
        others = [path for path in _entries(folder) if path != own]
        running = [_content(path) for path in others if _is_running(path)]
        yield Neighbours(folder, frozenset(path.name for path in (own, *others)), running)
    finally:
        os.close(file)
        _tidy(folder)


def _folder() -> Path:
    """Return the folder that all users of this machine share.

    Raises:
        OSError: there is none, or it is another thing than a folder.
    """
    path = Path(tempfile.gettempdir(), "harmoeny-measuring")
    with suppress(FileExistsError):
        path.mkdir()
        path.chmod(0o1777)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    return path


def _enter(folder: Path, run: str) -> tuple[int, Path]:
    """Return the own file, open and locked, and its path; it appears only then."""
    file, name = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, json.dumps({"run": run, "pid": os.getpid(), "since": now()}).encode())
        os.fchmod(file, 0o644)
        own = Path(name).with_name(Path(name).name.removeprefix(".") + _SUFFIX)
        Path(name).rename(own)
    except OSError:
        os.close(file)
        raise
    return file, own


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX)
    except OSError:
        return []


def _is_running(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("run", "pid", "since")}
    except (OSError, ValueError, TypeError, KeyError):
        return {"run": "unknown", "pid": None, "since": None}


def _tidy(folder: Path) -> None:
    """Remove what has ended, unless somebody runs who will ask for it."""
    entries = _entries(folder)
    if not any(_is_running(path) for path in entries):
        for path in entries:
            with suppress(OSError):  # another user's
                path.unlink()
