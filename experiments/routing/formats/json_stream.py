"""Reads the elements of a JSON list one by one: a file need not fit in memory, nor stay open, so many can be read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Bytes that are read at first, and held of every file that is read beside others.
_CHUNK = 1 << 16
_BETWEEN = re.compile(r"[\s,]*")


def elements(path: Path, key: str | None = None) -> Iterator[Any]:
    """Yield the elements, objects or lists, of the list that a file is, or has under a key.

    Raises:
        ValueError: it is not, or is cut off; the element is named.
    """
    start = re.compile(r"\s*\[" if key is None else rf'"{re.escape(key)}"\s*:\s*\[')
    try:
        yield from _elements(_reader(path), start, path, "list" if key is None else f"list {key!r}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8 ({error.reason})") from error


def _reader(path: Path) -> Callable[[int], str]:
    """Return what reads on by about so many bytes, and returns nothing at the end alone."""
    decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0

    def read(size: int) -> str:
        nonlocal at
        with path.open("rb") as file:
            file.seek(at)
            text = ""
            while not text and (data := file.read(size)):
                at += len(data)
                text = decoder.decode(data)
            return text or decoder.decode(b"", final=True)

    return read


def _elements(read: Callable[[int], str], start: re.Pattern[str], path: Path, what: str) -> Iterator[Any]:
    decoder, text = json.JSONDecoder(), read(_CHUNK)
    while (found := start.search(text)) is None:
        more = read(_CHUNK)
        if not more:
            raise ValueError(f"{path}: has no {what}")
        text += more
    at, number, wanted = found.end(), 0, _CHUNK
    while True:
        at = _end_of(_BETWEEN, text, at)
        if text[at : at + 1] == "]":
            return
        try:
            element, at = decoder.raw_decode(text, at)
        except ValueError as error:
            more = read(wanted)
            if not more:
                raise ValueError(f"{path}: element {number} is cut off or damaged ({error})") from error
            # An element that is longer than all that was read so far is not parsed again for every chunk.
            text, at, wanted = text[at:] + more, 0, 2 * wanted
            continue
        yield element
        number += 1


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None, "it matches nothing, too"
    return match.end()
