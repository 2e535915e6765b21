"""Traces as Parquet files with a versioned schema; a damaged one is refused by name and row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.routing.trace import Cell, RecordedRouting
from harmoeny.placement import IntArray
from results_schema.atomic import atomic_path

VERSION = 1
#: docs/metrics.md defines the columns.
SCHEMA = pa.schema(
    [
        ("batch", pa.int32()),
        ("layer", pa.int32()),
        ("rank", pa.int32()),
        ("num_tokens", pa.int64()),
        ("counts", pa.list_(pa.int64())),
        ("token_paths", pa.list_(pa.int32())),
    ]
)
_KEY = b"harmoeny_trace"
_SIZES = ("num_batches", "num_layers", "world_size", "num_experts", "top_k")


def make_trace(
    path: Path, expert_ids: Sequence[Sequence[Sequence[IntArray]]], num_experts: int, names: tuple[str, str],
    stacks: list[int], *, token_paths: bool,
) -> RecordedRouting:  # fmt: skip
    """Make a trace of what the ranks of a run routed.

    Args:
        path: the file that it will be written to.
        expert_ids: by rank, batch and MoE layer, int64 ``[num_tokens, top_k]``, -1 for none.
        num_experts: experts per MoE layer.
        names: of the model and of the data set.
        stacks: per MoE layer, the stack that it belongs to.
        token_paths: keep the experts of every token and not only their counts.
    """
    shape = len(expert_ids[0]), len(expert_ids[0][0]), len(expert_ids)
    num_tokens, counts = np.zeros(shape, dtype=np.int64), np.zeros((*shape, num_experts), dtype=np.int64)
    paths: dict[Cell, IntArray] = {}
    for cell in np.ndindex(*shape):
        batch, layer, rank = cell
        ids = expert_ids[rank][batch][layer]
        num_tokens[cell] = len(ids)
        counts[cell] = np.bincount(ids[ids >= 0], minlength=num_experts)
        if token_paths:
            paths[batch, layer, rank] = ids
    top_k = expert_ids[0][0][0].shape[1]
    return RecordedRouting(str(path), *names, top_k, num_tokens, counts, paths, stacks)


def write_trace(trace: RecordedRouting, run_id: str) -> None:
    """Write a trace in one step."""
    cells = [(int(b), int(layer), int(r)) for b, layer, r in np.ndindex(*trace.num_tokens.shape)]
    columns: list[Any] = [list(column) for column in zip(*cells, strict=True)]
    columns.append([int(trace.num_tokens[cell]) for cell in cells])
    columns.append([trace.counts[cell] for cell in cells])
    columns.append([trace.paths[cell].ravel() if trace.paths else None for cell in cells])
    about = {
        "version": VERSION,
        "run_id": run_id,
        "model": trace.model,
        "dataset": trace.dataset,
        **{name: getattr(trace, name) for name in _SIZES},
        "stacks": trace.stacks,
        "token_paths": bool(trace.paths),
    }
    table = pa.table(columns, schema=SCHEMA.with_metadata({_KEY: json.dumps(about)}))
    with atomic_path(Path(trace.path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_about(path: Path) -> dict[str, Any]:
    """Read what a trace says of itself: names, sizes, and the run that wrote it.

    Raises:
        ValueError: it is no trace, or of a version that is not known.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        about = json.loads(metadata[_KEY]) if _KEY in metadata else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable Parquet file ({' '.join(str(error).split())})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path}: no trace of routing (the file's metadata has no {_KEY.decode()!r})")
    if about.get("version") != VERSION:
        raise ValueError(f"{path}: version {about.get('version')!r} of the trace format, must be {VERSION}")
    for name in _SIZES:
        if not isinstance(about.get(name), int) or about[name] < 1:
            raise ValueError(f"{path}: {name} is {about.get(name)!r}, must be at least 1")
    return about


def read_trace(path: Path) -> RecordedRouting:
    """Read a trace and check every row.

    Raises:
        ValueError: the file is damaged or contradicts itself; the first row that is wrong is named.
    """
    about = read_about(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable Parquet file ({' '.join(str(error).split())})") from error
    for name in SCHEMA.names:
        if name not in table.column_names:
            raise ValueError(f"{path}: column {name!r} is missing")
    batches, layers, ranks, experts, top_k = (about[name] for name in _SIZES)
    num_tokens = np.full((batches, layers, ranks), -1, dtype=np.int64)
    counts = np.zeros((batches, layers, ranks, experts), dtype=np.int64)
    paths: dict[Cell, IntArray] = {}
    for number, row in enumerate(table.select(SCHEMA.names).to_pylist()):
        cell = row["batch"], row["layer"], row["rank"]
        where = f"{path}: row {number} (batch {cell[0]}, layer {cell[1]}, rank {cell[2]})"
        if any(i is None or not 0 <= i < n for i, n in zip(cell, num_tokens.shape, strict=True)):
            raise ValueError(f"{where}: must be below {batches}, {layers} and {ranks}")
        if num_tokens[cell] >= 0:
            raise ValueError(f"{where}: is there twice")
        num_tokens[cell], counts[cell] = _checked(row, experts, top_k, where)
        if about["token_paths"]:
            paths[cell] = _checked_paths(row, counts[cell], int(num_tokens[cell]), top_k, where)
    missing = np.argwhere(num_tokens < 0)
    if len(missing):
        batch, layer, rank = missing[0]
        raise ValueError(
            f"{path}: {len(table)} rows, must be {num_tokens.size}: none for batch {batch}, layer {layer}, rank {rank}"
        )
    return RecordedRouting(
        path=str(path),
        model=about["model"],
        dataset=about["dataset"],
        top_k=top_k,
        num_tokens=num_tokens,
        counts=counts,
        paths=paths,
        stacks=about.get("stacks"),
    )


def _checked(row: dict[str, Any], num_experts: int, top_k: int, where: str) -> tuple[int, IntArray]:
    """Return a row's number of tokens and its counts."""
    num_tokens, counts = row["num_tokens"], row["counts"]
    if num_tokens is None or num_tokens < 0:
        raise ValueError(f"{where}: num_tokens is {num_tokens}, must be at least 0")
    if counts is None or len(counts) != num_experts or None in counts:
        found = "none" if counts is None else len(counts)
        raise ValueError(f"{where}: counts of {found} experts, must be {num_experts}")
    for expert, count in enumerate(counts):
        if not 0 <= count <= num_tokens:
            raise ValueError(f"{where}: expert {expert} has {count} tokens, must be 0 to {num_tokens}, all of them")
    if sum(counts) > num_tokens * top_k:
        raise ValueError(f"{where}: {sum(counts)} assignments, must be at most {num_tokens * top_k}: top_k is {top_k}")
    return num_tokens, np.array(counts, dtype=np.int64)


def _checked_paths(row: dict[str, Any], counts: IntArray, num_tokens: int, top_k: int, where: str) -> IntArray:
    """Return a row's token paths, int64 ``[num_tokens, top_k]``."""
    found = row["token_paths"]
    if found is None or len(found) != num_tokens * top_k or None in found:
        raise ValueError(f"{where}: token_paths of {len(found or [])} assignments, must be {num_tokens * top_k}")
    ids = np.array(found, dtype=np.int64).reshape(num_tokens, top_k)
    if ids.size and not (ids.min() >= -1 and ids.max() < len(counts)):
        raise ValueError(f"{where}: token_paths name an expert outside 0 to {len(counts) - 1}")
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError(f"{where}: token_paths send a token to one expert twice")
    if (np.bincount(ids[ids >= 0], minlength=len(counts)) != counts).any():
        raise ValueError(f"{where}: token_paths do not add up to counts")
    return ids
