"""The same rows as files of every kind, for tests to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [{"id": i, "text": f"Text {i}.\n\nSecond paragraph.", "translation": {"en": f"Word {i}"}} for i in range(3)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: path.write_text("".join(f"{json.dumps(row)}\n\n" for row in ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "csv": lambda path: path.write_text(
        "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in ROWS)
    ),
    "tsv": lambda path: path.write_text("id\ttext\n" + "".join(f'{row["id"]}\t"{row["text"]}"\n' for row in ROWS)),
}  # fmt: skip


def written(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    WRITERS[kind](path)
    return str(path)
