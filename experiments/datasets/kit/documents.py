"""Documents in local files: text, JSON lines, Parquet and CSV, told apart by their suffix."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_PER_READ = 1024


def documents_of(path: Path, text_field: str) -> Iterator[str]:
    """Yield a file's documents: the paragraphs of a text, else the text field of every row.

    Args:
        path: the file; one whose suffix says nothing else is a text.
        text_field: the column; ``a.b`` is the field b of the field a.

    Raises:
        ValueError: a row is no such row, or has no text in the field.
        OSError: the file cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        yield from _paragraphs(path)
        return
    for number, row in enumerate(reader(path), 1):
        text = field_of(row, text_field)
        if not isinstance(text, str):
            known = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none"
            raise ValueError(
                f"dataset.text_field: {text_field!r}, must be a field with text; row {number} of {path} has {known}"
            )
        if text.strip():
            yield text.strip()


def is_structured(path: Path) -> bool:
    """Tell whether a file has rows with fields."""
    return path.suffix.lower() in _READERS


def field_of(row: Any, name: str) -> Any:
    """Return a field of a row, None where it has none; ``a.b`` is the field b of the field a."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def _paragraphs(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for has_text, lines in groupby(file, key=lambda line: bool(line.strip())):
            if has_text:
                yield "".join(lines).strip()


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"dataset.path: line {number} of {path} is no JSON ({error})") from error


def _csv_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_PER_READ):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"dataset.path: {path} is no readable Parquet file ({' '.join(str(error).split())})"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
