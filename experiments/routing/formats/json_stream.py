"""Reads the elements of a JSON list one by one, so that a file need not fit in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def elements(path: Path, key: str | None = None) -> Iterator[Any]:
    """Yield the elements, objects or lists, of the list that a file is, or has under a key.

    Raises:
        ValueError: it is not, or is cut off; the element is named.
    """
    start = re.compile(r"\s*\[" if key is None else rf'"{re.escape(key)}"\s*:\s*\[')
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _elements(file, start, path, "list" if key is None else f"list {key!r}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8 ({error.reason})") from error


def _elements(file: TextIO, start: re.Pattern[str], path: Path, what: str) -> Iterator[Any]:
    decoder, text = json.JSONDecoder(), file.read(_CHUNK)
    while (found := start.search(text)) is None:
        more = file.read(_CHUNK)
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
            more = file.read(wanted)
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
