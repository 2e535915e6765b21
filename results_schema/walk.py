"""The files of a folder, those behind symlinks included: data sets and results often lie on another disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def walk_files(folder: Path, *, skip_unreadable: bool = False) -> Iterator[Path]:
    """Yield everything in or under a folder that is no folder: files, and what only has a name, such as a broken link.

    Links to folders are followed, after all that needs none. Every folder is entered once, under whichever name comes
    first, and never one that contains ``folder``, so that links in a circle do no harm. Hidden names are passed over.

    Args:
        folder: one that does not exist has no files.
        skip_unreadable: pass over subfolders that cannot be read.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {_identity(parent) for parent in folder.resolve().parents}
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        links: list[Path] = []
        for start in waiting:
            yield from _walk(start, seen, links, skip_unreadable=skip_unreadable)
        waiting = sorted(links)


def _walk(start: Path, seen: set[tuple[int, int]], links: list[Path], *, skip_unreadable: bool) -> Iterator[Path]:
    """Yield what lies under ``start``, and put links to folders aside."""
    folders = [start]
    while folders:
        folder = folders.pop()
        try:
            identity = _identity(folder)
            entries = [] if identity in seen else sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if skip_unreadable:
                continue
            raise
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif path.is_dir():
                links.append(path)
            else:
                yield path


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
