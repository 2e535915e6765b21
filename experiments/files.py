"""Prepared data that is kept between runs, each file with a checksum, so that a torn one is made anew."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from experiments.console import say
from results_schema.atomic import atomic_path

#: What a kept file ends with: this and the digest of what stands before it, as text.
_MARK = b"\nsha256:"
_TRAILER_BYTES = len(_MARK) + hashlib.sha256().digest_size * 2
_REMEDY = "set HARMOENY_CACHE to a folder with room that can be written"


def cache_dir() -> Path:
    """Return the cache folder: ``$HARMOENY_CACHE``, else ``harmoeny`` under the user's cache folder; it is created.

    Raises:
        ValueError: it cannot be created.
    """
    chosen = os.environ.get("HARMOENY_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        path = Path(chosen) if chosen else Path.home() / ".cache"
        path = path if os.environ.get("HARMOENY_CACHE") else path / "harmoeny"
    except RuntimeError as error:
        raise ValueError(f"HARMOENY_CACHE: not set, and this user has no home folder; {_REMEDY}") from error
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"HARMOENY_CACHE: {str(path)!r} cannot be created ({error.strerror}), must be a folder; {_REMEDY}"
        ) from error
    return path


def kept_file(name: str, make: Callable[[], bytes]) -> Path:
    """Return a file of the cache: the one that is there, unless it is damaged, else a new one.

    Args:
        name: its name, which says all that its content depends on.
        make: gives the content; the file has a checksum after it.

    Raises:
        ValueError: the file cannot be read, or there is none and it cannot be written.
    """
    path = cache_dir() / name
    try:
        if path.exists():
            if _is_intact(path):
                return path
            say(f"{path} is damaged and is made anew")
    except OSError as error:
        raise ValueError(f"HARMOENY_CACHE: {str(path)!r} cannot be read ({_reason(error)}); {_REMEDY}") from error
    keep(path, make())
    return path


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache with a checksum after its content, in place of what is there.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.write(_MARK + hashlib.sha256(content).hexdigest().encode())
    except OSError as error:
        raise ValueError(f"HARMOENY_CACHE: {str(path)!r} cannot be written ({_reason(error)}); {_REMEDY}") from error


def kept_content(path: Path) -> bytes:
    """Return what `kept_file` keeps in a file, without the checksum."""
    return path.read_bytes()[:-_TRAILER_BYTES]


def intact_content(path: Path) -> bytes | None:
    """Return what is kept in a file, or None where there is none, or a damaged one, or it cannot be read."""
    try:
        return kept_content(path) if _is_intact(path) else None
    except OSError:
        return None


def _is_intact(path: Path) -> bool:
    left = path.stat().st_size - _TRAILER_BYTES
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
        return left == 0 and file.read() == _MARK + digest.hexdigest().encode()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
