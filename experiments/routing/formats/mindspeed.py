"""MindSpeed-RL's token collection: one JSON with the tokens of every expert by layer, over all ranks and the whole run.

Source: https://gitee.com/ascend/MindSpeed-RL, docs/features/EPLB.md (token_collects_all.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat, batch_of_counts
from experiments.routing.formats.counters import dense
from experiments.routing.trace import RecordedRouting
from results_schema.atomic import write_text


class MindSpeed(TraceFormat):
    """One batch per file."""

    name: ClassVar[str] = "mindspeed"
    description: ClassVar[str] = "MindSpeed-RL's token_collects_all.json, {layer: {expert: tokens}}"

    def matches(self, sample: Sample) -> bool:
        """Look for a number as the key of an object that starts with a number as a key."""
        compact = "".join(sample.text[:200].split())
        outer, _, rest = compact.partition(":{")
        return outer.startswith('{"') and outer[2:-1].isdigit() and rest.startswith('"') and rest[1:2].isdigit()

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield a batch per file."""
        for path in files:
            try:
                content: Any = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: no readable JSON ({error})") from error
            layers = sorted(content, key=int) if isinstance(content, dict) and all(map(str.isdigit, content)) else []
            if not layers:
                raise ValueError(f"{path}: must be an object with a number per layer")
            rows = dense({f"{path}: layer {name}": content[name] for name in layers}, options.num_experts)
            yield batch_of_counts(str(path), layers, rows)

    def write(self, trace: RecordedRouting, path: Path) -> None:
        """Write the counts of all batches together."""
        total = trace.counts.sum(axis=(0, 2))
        table = {str(layer): {str(e): int(n) for e, n in enumerate(row)} for layer, row in enumerate(total)}
        write_text(path, json.dumps(table, indent=2) + "\n")
