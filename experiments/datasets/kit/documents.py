"""Documents in local files: the paragraphs of texts, and the rows of JSON, JSON lines, Parquet and CSV."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.datasets.kit.streams import Part, UnreadableError, parts, refusing

_ROWS_PER_READ = 1024
_BLOCK_BYTES = 2**20
_MISSING = object()


def documents_of(path: Path, text_field: str) -> Iterator[str]:
    """Yield a file's documents: the paragraphs of a text, else the text field of every row that has text in it.

    Args:
        path: the file; one whose suffix says nothing else is a text. It may be compressed, or be an archive.
        text_field: the column; ``a.b`` is the field b of the field a.

    Raises:
        ValueError: the file cannot be read or holds no text, a row is no such row, or has no text in the field.
    """
    with refusing("dataset.path", path):
        for part in parts(path):
            reader = _READERS.get(_kind(part))
            if reader is None:
                yield from _paragraphs(part)
                continue
            for number, row in enumerate(reader(part, text_field), 1):
                if text := text_of(row, text_field, f"row {number} of {part.name}"):
                    yield text


def update_digest(digest: hashlib._Hash, path: Path, text_field: str) -> None:
    """Digest the text that `documents_of` reads, however it is packed and encoded.

    Raises:
        ValueError: the file cannot be read or holds no text.
    """
    with refusing("dataset.path", path):
        for part in parts(path):
            kind = _kind(part)
            stream = part.stream if kind == ".parquet" else part.utf8()
            content = hashlib.sha256()
            while block := stream.read(_BLOCK_BYTES):
                content.update(block)
            digest.update(content.digest())
            if kind in _READERS:
                digest.update(f"{kind} {text_field}".encode())


def count_bytes(path: Path, most: int) -> int:
    """Return how many bytes a file has when it is unpacked; the count ends soon after ``most``.

    Raises:
        ValueError: the file cannot be read.
    """
    size = 0
    with refusing("dataset.path", path):
        for part in parts(path):
            if part.path is not None:
                return part.path.stat().st_size
            while size <= most and (block := part.stream.read(_BLOCK_BYTES)):
                size += len(block)
    return size


def text_of(row: Any, name: str, where: str) -> str:
    """Return the text in a field of a row, without the white space around it; none where the row or field is empty.

    A string is a row whose field ``text`` it is. Surrogates without their other half become U+FFFD.

    Args:
        row: usually a mapping.
        name: the field; ``a.b`` is the field b of the field a, unless there is a field of that name.
        where: names the row in the message.

    Raises:
        ValueError: there is no such field, or it holds something else.
    """
    if row is None or row == "" or row == {}:
        return ""
    value = {"text": row} if isinstance(row, str) else row
    for part in [name] if isinstance(value, Mapping) and name in value else name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING if value is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        known = ", ".join(map(_shown, row)) if isinstance(row, Mapping) else "none"
        raise ValueError(f"dataset.text_field: {name!r}, must be a field with text; {where} has {known}")
    try:
        value.encode()
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.strip()


def _shown(name: object) -> str:
    """Return a field's name, in quotes where it has characters that nobody would see."""
    text = str(name)
    return text if text.isprintable() and text == text.strip() and text else repr(text)


def _kind(part: Part) -> str:
    """Return the suffix that says how a part is read; Parquet is known by its first bytes, too."""
    return ".parquet" if part.head.startswith(b"PAR1") else part.suffix


def _paragraphs(part: Part) -> Iterator[str]:
    for has_text, lines in groupby(part.lines(), key=lambda line: bool(line.strip())):
        if has_text:
            yield "".join(lines).strip()


def _json_rows(part: Part, _: str) -> Iterator[Any]:
    """Yield the values of the lines, the items of an array, or one object that goes over several lines."""
    lines = enumerate(part.lines(), 1)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if first.lstrip().startswith("[") or not _is_json(first):
        text = first + "".join(line for _, line in lines)
        value = _parsed(text, number, part.name) if text else []
        yield from value if isinstance(value, list) else [value]
        return
    yield _parsed(first, number, part.name)
    for number, line in lines:
        if line.strip():
            yield _parsed(line.lstrip("\ufeff"), number, part.name)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, number: int, name: str) -> Any:
    """Parse JSON that begins in line ``number`` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"line {number + error.lineno - 1} of {name} is no JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UnreadableError(f"line {number} of {name} is no JSON ({error})") from error


def _csv_rows(part: Part, text_field: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if part.suffix == ".tsv" else ","
    rows = (row for row in csv.reader(part.lines(newline=""), delimiter=delimiter, strict=True) if row)
    number, header = 0, []
    try:
        header = next(rows, [])
        if header.count(text_field) > 1:
            raise UnreadableError(f"the header of {part.name} names {text_field!r} more than once")
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise UnreadableError(
                    f"row {number} of {part.name} has {len(row)} fields, must have {len(header)} as its header does"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        where = f"row {number + 1}" if header else "the header"
        raise UnreadableError(f"{where} of {part.name} is no CSV ({error})") from error


def _parquet_rows(part: Part, text_field: str) -> Iterator[Any]:
    """Yield the rows with nothing in all fields but the one with the text: what nobody reads may be damaged."""
    number = 1
    try:
        with _on_disk(part) as source, pq.ParquetFile(source) as file:
            names = file.schema_arrow.names
            column = text_field if text_field in names else text_field.partition(".")[0]
            for batch in file.iter_batches(_ROWS_PER_READ, columns=[column]):
                yield from (dict.fromkeys(names) | row for row in batch.to_pylist())
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableError(f"{part.name} is no readable Parquet file from row {number} on ({reason})") from error


@contextmanager
def _on_disk(part: Part) -> Iterator[Any]:
    """Give a file that can be read in any order."""
    if part.path is not None:
        yield part.path
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(part.stream, copy)
        yield copy


_READERS: dict[str, Callable[[Part, str], Iterator[Any]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
