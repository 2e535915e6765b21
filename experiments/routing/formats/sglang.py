"""SGLang's expert distribution recorder: ``stat`` (counts of all ranks by step), ``per_pass`` and ``per_token``.

Source: https://github.com/sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py (what is dumped) and
expert_location.py (what ``--init-expert-location`` takes).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.routing.formats.base import (
    ReadOptions,
    RecordedBatch,
    Sample,
    TraceFormat,
    batch_of_counts,
    load_tensors,
)
from experiments.routing.formats.json_stream import elements
from experiments.routing.formats.physical import logical_counts
from experiments.routing.trace import RecordedRouting
from results_schema.atomic import write_text


class SGLang(TraceFormat):
    """Counts by forward pass. Files of several ranks belong together: their counts of a pass are added up."""

    name: ClassVar[str] = "sglang"
    description: ClassVar[str] = "SGLang's expert distribution recorder (.pt; .json with logical_count)"

    def matches(self, sample: Sample) -> bool:
        """Look for the recorder's keys."""
        if sample.text.startswith("{") and '"logical_count"' in sample.text:
            return True
        return isinstance(sample.tensors, Mapping) and not {"logical_count", "records"}.isdisjoint(sample.tensors)

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:  # noqa: ARG002
        """Yield a batch per step; a file per rank holds the same steps."""
        if all(_is_json(path) for path in files):
            for path in files:
                yield from _steps(path, _listed_steps(path))
            return
        contents = {path: _content(path) for path in files}
        if all("logical_count" in content for content in contents.values()):
            for path, content in contents.items():
                yield from _steps(path, _stored_steps(path, content["logical_count"]))
            return
        passes: dict[int, list[tuple[str, Any]]] = defaultdict(list)
        for path, content in contents.items():
            if "records" not in content:
                raise ValueError(f"{path}: has logical_count, other files have records: import them apart")
            for number, record in enumerate(content["records"]):
                where = f"{path}: record {number}"
                pass_id, counts = _record(where, record, content.get("last_physical_to_logical_map"))
                passes[pass_id].append((where, counts))
        for _, parts in sorted(passes.items()):
            where, total = parts[0][0], sum(counts for _, counts in parts)
            yield batch_of_counts(where, [str(layer) for layer in range(len(total))], total)

    def write(self, trace: RecordedRouting, path: Path) -> None:
        """Write what ``--init-expert-location FILE.json`` makes a placement of: counts by step, layer and expert."""
        if path.suffix != ".json":
            raise ValueError(f"--out: {str(path)!r}, must end in .json, by which SGLang knows how to read it")
        write_text(path, json.dumps({"logical_count": trace.counts.sum(axis=2).tolist()}) + "\n")


def _is_json(path: Path) -> bool:
    return Sample.of(path).text.startswith("{")


def _content(path: Path) -> Mapping[str, Any]:
    content = load_tensors(path)
    if not isinstance(content, Mapping) or {"logical_count", "records"}.isdisjoint(content):
        raise ValueError(f"{path}: has neither logical_count nor records")
    return content


def _steps(path: Path, steps: Iterable[Any]) -> Iterator[RecordedBatch]:
    """Yield the steps of mode ``stat``; its buffer has empty ones where fewer were run than it has room for."""
    for number, counts in enumerate(steps):
        layers = [str(layer) for layer in range(len(counts) if isinstance(counts, Sized) else 0)]
        batch = batch_of_counts(f"{path}: step {number}", layers, counts)
        if batch.counts.any():
            yield batch


def _stored_steps(path: Path, logical_count: Any) -> Any:
    """Return ``[steps, layers, experts]`` of what has them, or one step alone."""
    steps = np.asarray(logical_count)
    steps = steps[None] if steps.ndim == 2 else steps
    if steps.ndim != 3:
        raise ValueError(f"{path}: logical_count of shape {list(steps.shape)}, must be [steps, layers, experts]")
    return steps


def _listed_steps(path: Path) -> Iterator[Any]:
    """Yield ``[layers][experts]`` by step of a JSON."""
    found = elements(path, "logical_count")
    first: Any = next(found, [])
    if isinstance(first, list) and first and not isinstance(first[0], list):  # a layer: there is one step alone
        yield [first, *found]
        return
    yield first
    yield from found


def _record(where: str, record: Any, physical_to_logical: Any) -> tuple[int, Any]:
    """Return the pass and the counts by expert, ``[num_layers, num_experts]``, of one record of one rank."""
    if not isinstance(record, Mapping) or {"forward_pass_id", "global_physical_count"} - set(record):
        raise ValueError(f"{where}: must have forward_pass_id and global_physical_count")
    if physical_to_logical is None:
        raise ValueError(f"{where}: the file has no last_physical_to_logical_map")
    return int(record["forward_pass_id"]), logical_counts(where, record["global_physical_count"], physical_to_logical)
