"""Megatron-LM's routing traces: JSON lines, one file per rank, one line per step and layer.

Source: https://github.com/NVIDIA/Megatron-LM, ``--moe-routing-trace-path`` (router_trace_rank*.jsonl).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat, batch_of_ids, ids_of
from harmoeny.placement import IntArray

_FIELDS = ("step", "block", "layer", "rank", "num_tokens", "topk", "top_indices")


class _Line(NamedTuple):
    """One line of a rank's file: where it stands, its step, the layer's name, and the experts of its tokens."""

    where: str
    step: int
    rank: int
    layer: str
    ids: IntArray


class Megatron(TraceFormat):
    """The experts of every token, by step. All files of one recording are read side by side, one step at a time."""

    name: ClassVar[str] = "megatron"
    description: ClassVar[str] = "Megatron-LM's --moe-routing-trace-path (.jsonl, one per rank)"

    def matches(self, sample: Sample) -> bool:
        """Look for the fields in the first line, which may be longer than what was read."""
        return sample.text.startswith("{") and all(f'"{name}"' in sample.text for name in _FIELDS[:5])

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield a batch per step with the layers of the decoder and of multi-token prediction."""
        steps = [groupby(_lines(path), key=lambda line: line.step) for path in files]
        while True:
            parts = [next(of_file, None) for of_file in steps]
            found = [part for part in parts if part is not None]
            if not found:
                return
            by_rank = [list(lines) for _, lines in found]
            where = by_rank[0][0].where
            numbers = {number for number, _ in found}
            if len(found) < len(parts) or len(numbers) > 1:
                pairs = zip(files, parts, strict=True)
                ends = next(path for path, part in pairs if part is None or part[0] != min(numbers))
                raise ValueError(f"{where}: step {min(numbers)} is not in {ends} (--batches takes those before it)")
            yield _step(where, by_rank, options.num_experts)


def _step(where: str, by_rank: Sequence[Sequence[_Line]], num_experts: int | None) -> RecordedBatch:
    """Return the batch of one step, ranks in ascending order."""
    ordered = sorted(by_rank, key=lambda lines: lines[0].rank)
    layers = list(dict.fromkeys(line.layer for line in ordered[0]))
    table: list[dict[str, IntArray]] = []
    for lines in ordered:
        table.append({line.layer: line.ids for line in lines})
        if list(table[-1]) != layers or len(lines) != len(layers):
            raise ValueError(
                f"{lines[-1].where}: step {lines[-1].step} of rank {lines[0].rank} has layers "
                f"{', '.join(line.layer for line in lines)}, must be {', '.join(layers)}, each once"
            )
    if len({lines[0].rank for lines in ordered}) < len(ordered):
        raise ValueError(f"{where}: rank {ordered[0][0].rank} is in two files")
    return batch_of_ids(where, layers, [[of_rank[layer] for of_rank in table] for layer in layers], num_experts)


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a file, each checked."""
    with path.open(encoding="utf-8") as file:
        rank = None
        for number, text in enumerate(file):
            where = f"{path}: line {number + 1}"
            try:
                record: Any = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where}: cut off or no JSON ({error})") from error
            missing = [name for name in _FIELDS if not isinstance(record, dict) or name not in record]
            if missing:
                raise ValueError(f"{where}: {missing[0]!r} is missing")
            rank = record["rank"] if rank is None else rank
            if record["rank"] != rank:
                raise ValueError(f"{where}: rank {record['rank']}, must be {rank} as in the line before")
            block = f"mtp {record['mtp_idx']}" if "mtp_idx" in record else str(record["block"])
            ids = ids_of(where, record["top_indices"], int(record["topk"]))
            if len(ids) != record["num_tokens"]:
                raise ValueError(f"{where}: experts of {len(ids)} tokens, must be num_tokens={record['num_tokens']}")
            yield _Line(where, int(record["step"]), int(record["rank"]), f"{block} {record['layer']}", ids)
