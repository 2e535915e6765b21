from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.routing.trace_files import SCHEMA, VERSION, read_about, read_trace, write_trace
from tests.documented import names
from tests.experiments.routing.test_trace import random_trace

Change = Callable[[list[dict[str, Any]], dict[str, Any]], object]


@pytest.mark.parametrize("token_paths", [True, False])
def test_what_is_written_is_read(token_paths: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.parquet"
    trace, _ = random_trace(0, world_size=2, token_paths=token_paths, path=str(path))
    write_trace(trace, "run-1")
    found = read_trace(path)
    np.testing.assert_array_equal(found.counts, trace.counts)
    np.testing.assert_array_equal(found.num_tokens, trace.num_tokens)
    assert found.paths.keys() == trace.paths.keys()
    for place, ids in trace.paths.items():
        np.testing.assert_array_equal(found.paths[place], ids)
    assert (found.model, found.dataset, found.top_k, found.stacks) == ("model", "text", 2, [0, 0, 1])
    about = read_about(path)
    assert about["version"] == VERSION
    assert about["run_id"] == "run-1"


def test_every_column_is_documented() -> None:
    assert names("Traces") == SCHEMA.names


def change(path: Path, edit: Change) -> None:
    """Rewrite a trace with its rows and what it says of itself edited."""
    table = pq.read_table(path)
    rows, about = table.to_pylist(), json.loads(table.schema.metadata[b"harmoeny_trace"])
    edit(rows, about)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata({b"harmoeny_trace": json.dumps(about)})), path)


def _set(row: int, name: str, value: Any) -> Change:
    return lambda rows, _: rows[row].__setitem__(name, value)


def _count(row: int, expert: int, value: int) -> Change:
    return lambda rows, _: rows[row]["counts"].__setitem__(expert, value)


def _path(row: int, values: list[int]) -> Change:
    return lambda rows, _: rows[row]["token_paths"].__setitem__(slice(0, len(values)), values)


BAD: dict[str, tuple[Change, str]] = {
    "negative count": (_count(3, 1, -1), r"row 3 \(batch 0, layer 1, rank 1\): expert 1 has -1 tokens, must be 0"),
    "too many": (_count(0, 4, 13), r"row 0 \(batch 0, layer 0, rank 0\): expert 4 has 13 tokens, must be 0 to 12"),
    "sum": (_set(1, "counts", [12, 12, 1, 0, 0]), r"row 1 .*: 25 assignments, must be at most 24: top_k is 2"),
    "experts": (_set(2, "counts", [1, 2]), r"row 2 .*: counts of 2 experts, must be 5"),
    "no counts": (_set(2, "counts", None), r"row 2 .*: counts of none experts, must be 5"),
    "tokens": (_set(4, "num_tokens", -2), r"row 4 .*: num_tokens is -2, must be at least 0"),
    "layer": (_set(4, "layer", 3), r"row 4 \(batch 0, layer 3, rank 0\): must be below 2, 3 and 2"),
    "twice": (_set(1, "rank", 0), r"row 1 \(batch 0, layer 0, rank 0\): is there twice"),
    "missing": (lambda rows, _: rows.pop(7), r"11 rows, must be 12: none for batch 1, layer 0, rank 1"),
    "no such expert": (_path(5, [5]), r"row 5 .*: token_paths name an expert outside 0 to 4"),
    "paths": (_set(6, "token_paths", [1, 2]), r"row 6 .*: token_paths of 2 assignments, must be 24"),
    "one twice": (_path(8, [1, 1]), r"row 8 .*: token_paths send a token to one expert twice"),
    "other counts": (_path(9, [-1] * 24), r"row 9 .*: token_paths do not add up to counts"),
    "version": (lambda _, about: about.update(version=2), r"version 2 of the trace format, must be 1"),
    "sizes": (lambda _, about: about.update(num_experts=0), r"num_experts is 0, must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_trace_is_refused_by_name_and_row(name: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    trace, _ = random_trace(0, world_size=2, path=str(path))
    write_trace(trace, "run")
    edit, message = BAD[name]
    change(path, edit)
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        read_trace(path)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    trace, _ = random_trace(0, world_size=2, path=str(path))
    write_trace(trace, "run")
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"^{path}: no readable Parquet file"):
            read_trace(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match=rf"^{path}: no trace of routing"):
        read_trace(path)
    metadata = pq.read_schema(pa.BufferReader(whole)).metadata
    pq.write_table(pa.table({"batch": [0]}).replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=rf"^{path}: column 'layer' is missing"):
        read_trace(path)
