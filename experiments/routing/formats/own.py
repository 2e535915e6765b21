"""Our own traces (``trace.record=``), and the routing that the authors of HarMoEny published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from experiments.routing.authors_csv import CASE_COLUMNS, read_published
from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import read_trace


class Own(TraceFormat):
    """A trace that a run of this harness recorded, or an import wrote."""

    name: ClassVar[str] = "harmoeny"
    description: ClassVar[str] = "our own traces (.parquet)"

    def matches(self, sample: Sample) -> bool:
        """Look for Parquet."""
        return sample.head.startswith(b"PAR1")

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:  # noqa: ARG002
        """Yield the batches of one file after the other."""
        for path in files:
            yield from _batches(read_trace(path))


class Published(TraceFormat):
    """The authors' ``expert_freq_*.csv``."""

    name: ClassVar[str] = "published"
    description: ClassVar[str] = "expert_freq_*.csv of HarMoEny's authors (--case names the series)"

    def matches(self, sample: Sample) -> bool:
        """Look for its columns."""
        return any(sample.text.startswith(f",{case},iteration,layer_idx,") for case in CASE_COLUMNS)

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield the batches of one series."""
        for path in files:
            try:
                trace = read_published(path, options.case)
            except ValueError as error:
                raise ValueError(str(error).replace("router.case:", "--case:")) from error
            yield from _batches(trace)


def _batches(trace: RecordedRouting) -> Iterator[RecordedBatch]:
    names = [str(layer) for layer in range(trace.num_layers)]
    ranks = range(trace.world_size)
    for batch in range(trace.num_batches):
        ids = None
        if trace.paths:
            ids = [[trace.paths[batch, layer, rank] for rank in ranks] for layer in range(trace.num_layers)]
        where = f"{trace.path}: batch {batch}"
        yield RecordedBatch(where, names, trace.counts[batch], trace.num_tokens[batch], trace.top_k, ids)
