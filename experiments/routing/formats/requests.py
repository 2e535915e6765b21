"""The per-request JSON of large public trace collections: a list with the chosen experts of every output token.

The first element has those of all tokens of the prompt (prefill), each further one those of one decoded token:
``{layer: [[expert, ...], ...], ...}``, null for layers without experts.

Source: huggingface.co/datasets/core12345/MoE_expert_selection_trace (arXiv 2510.05497).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat, batch_of_ids, ids_of
from experiments.routing.formats.json_stream import elements
from harmoeny.placement import IntArray


class Requests(TraceFormat):
    """A file per request. Prefill: a batch per request. Decode: all requests together, a batch per output token."""

    name: ClassVar[str] = "requests"
    description: ClassVar[str] = "a JSON per request: experts of the prompt, then of every decoded token"

    def matches(self, sample: Sample) -> bool:
        """Look for a list of objects with numbers as keys."""
        compact = "".join(sample.text[:200].split())
        return compact.startswith('[{"') and compact[3:4].isdigit()

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield the batches of one phase."""
        if options.phase == "prefill":
            for path in files:
                first = next(elements(path), None)
                if first is None:
                    raise ValueError(f"{path}: has no tokens")
                yield _batch(f"{path}: element 0", [_chosen(f"{path}: element 0", first)], options)
            return
        running = {path: enumerate(elements(path)) for path in files}
        for each in running.values():
            next(each, None)  # the prompt
        while running:
            step: list[dict[str, IntArray]] = []
            where = ""
            for path in list(running):
                found = next(running[path], None)
                if found is None:  # this request is done, the others go on
                    del running[path]
                    continue
                where = f"{path}: element {found[0]}"
                step.append(_chosen(where, found[1]))
            if step:
                yield _batch(where, step, options)


def _chosen(where: str, element: Any) -> dict[str, IntArray]:
    """Return int64 ``[num_tokens, top_k]`` by layer that has experts, in order."""
    if not isinstance(element, dict) or not all(key.isdigit() for key in element):
        raise ValueError(f"{where}: must be an object with a number per layer")
    layers = sorted((key for key, rows in element.items() if rows is not None), key=int)
    return {layer: ids_of(f"{where}: layer {layer}", element[layer]) for layer in layers}


def _batch(where: str, requests: Sequence[dict[str, IntArray]], options: ReadOptions) -> RecordedBatch:
    layers = list(requests[0])
    if not layers or any(list(request) != layers for request in requests):
        raise ValueError(f"{where}: has no layer with experts, or other ones than the request before it")
    try:
        ids = [[np.concatenate([request[layer] for request in requests])] for layer in layers]
    except ValueError as error:
        raise ValueError(f"{where}: another number of experts per token than the request before it") from error
    return batch_of_ids(where, layers, ids, options.num_experts)
