"""Recognises the format of recorded routing, reads it batch by batch, and makes one trace of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat
from experiments.routing.formats.megatron import Megatron
from experiments.routing.formats.mindspeed import MindSpeed
from experiments.routing.formats.olmoe import OLMoE
from experiments.routing.formats.own import Own, Published
from experiments.routing.formats.requests import Requests
from experiments.routing.formats.sglang import SGLang
from experiments.routing.formats.vllm import VLLM
from experiments.routing.trace import Cell, RecordedRouting
from harmoeny.placement import IntArray

#: The order matters only where two would match: what is more particular comes first.
FORMATS: dict[str, TraceFormat] = {
    each.name: each for each in (Own(), Published(), SGLang(), VLLM(), Megatron(), Requests(), MindSpeed(), OLMoE())
}


def recognise(files: Sequence[Path]) -> TraceFormat:
    """Return the format that all files have.

    Raises:
        ValueError: a file cannot be read, has no known format, or another one than the first.
    """
    found = []
    for path in files:
        try:
            sample = Sample.of(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}), must be recorded routing") from error
        known = next((one for one in FORMATS.values() if one.matches(sample)), None)
        if known is None:
            names = ", ".join(FORMATS)
            raise ValueError(f"{path}: no known format of recorded routing, must be one of {names} (docs/traces.md)")
        found.append(known)
        if known is not found[0]:
            raise ValueError(f"{path}: {known.name}, must be {found[0].name} as {files[0]}")
    return found[0]


def read_routing(
    files: Sequence[Path], options: ReadOptions, names: tuple[str, str], *,
    merge: int = 1, num_batches: int | None = None, token_paths: bool = False,
) -> RecordedRouting:  # fmt: skip
    """Read recorded routing of any format.

    Layers in which nothing was routed in any batch have no experts (a model's dense layers), and are left out.

    Args:
        files: of one recording, in order where that matters.
        options: what the files do not say.
        names: of the model and of the data set.
        merge: so many batches that follow each other become one; what is left over at the end is left out.
        num_batches: only so many of the merged batches; None: all.
        token_paths: keep the experts of every token.

    Raises:
        ValueError: a file is not as its format says; file and row are named.
    """
    batches = []
    for batch in islice(_merged(_alike(recognise(files).read(files, options)), merge), num_batches):
        if token_paths and batch.ids is None:
            raise ValueError(f"{batch.where}: only counts are recorded, so there are no paths of tokens to keep")
        batches.append(batch if token_paths else replace(batch, ids=None))
    if not batches:
        raise ValueError(f"{files[0]}: fewer than {merge} batches in which something was routed")
    counts = _one_width(batches)
    layers = np.flatnonzero(counts.any(axis=(0, 2, 3)))
    if not len(layers):
        raise ValueError(f"{batches[0].where}: nothing is routed in any layer")
    if options.num_experts not in (None, counts.shape[3]):
        raise ValueError(
            f"{batches[0].where}: {counts.shape[3]} experts, must be {options.num_experts} (--num-experts)"
        )
    top_k = _top_k(batches[0], options.top_k)
    _check_limits(batches, counts, top_k)
    return RecordedRouting(
        path=str(files[0]),
        model=names[0],
        dataset=names[1],
        top_k=top_k,
        num_tokens=np.stack([_tokens(batch, top_k) for batch in batches])[:, layers],
        counts=np.ascontiguousarray(counts[:, layers]),
        paths=_paths(batches, layers),
    )


def _alike(batches: Iterator[RecordedBatch]) -> Iterator[RecordedBatch]:
    """Refuse a batch that has other layers, ranks or experts per token than the first one."""
    first = None
    for batch in batches:
        first = first or batch
        found, wanted = (
            f"layers {', '.join(b.layers)} on {b.counts.shape[1]} ranks with {b.top_k or 'unknown'} experts per token"
            for b in (batch, first)
        )
        if found != wanted:
            raise ValueError(f"{batch.where}: {found}, must be {wanted}, as {first.where}")
        yield batch


def _merged(batches: Iterator[RecordedBatch], number: int) -> Iterator[RecordedBatch]:
    """Yield so many batches that follow each other as one."""
    while len(parts := list(islice(batches, number))) == number:
        if number == 1:
            yield parts[0]
            continue
        first = parts[0]
        num_tokens = [part.num_tokens for part in parts if part.num_tokens is not None]
        yield replace(
            first,
            counts=_one_width(parts).sum(axis=0),
            num_tokens=np.sum(num_tokens, axis=0) if num_tokens else None,
            ids=_joined([part.ids for part in parts if part.ids is not None]),
        )


def _joined(tables: Sequence[Sequence[Sequence[IntArray]]]) -> list[list[IntArray]] | None:
    """Join the tokens of several batches, by layer and rank; None where they are not known."""
    if not tables:
        return None
    by_layer = zip(*tables, strict=True)
    return [[np.concatenate(of_rank) for of_rank in zip(*of_layer, strict=True)] for of_layer in by_layer]


def _one_width(batches: Sequence[RecordedBatch]) -> IntArray:
    """Return int64 ``[num_batches, num_layers, num_ranks, num_experts]``, with as many experts as any batch has."""
    width = max(batch.counts.shape[2] for batch in batches)
    return np.stack([np.pad(b.counts, ((0, 0), (0, 0), (0, width - b.counts.shape[2]))) for b in batches])


def _top_k(first: RecordedBatch, asked: int | None) -> int:
    if first.top_k is None and asked is None:
        raise ValueError(f"{first.where}: only counts are recorded: --top-k must say how many experts a token has")
    if first.top_k is not None and asked not in (None, first.top_k):
        raise ValueError(f"{first.where}: {first.top_k} experts per token, not --top-k {asked}")
    top_k = first.top_k or asked or 0
    if top_k < 1:
        raise ValueError(f"--top-k: {asked}, must be at least 1")
    return top_k


def _tokens(batch: RecordedBatch, top_k: int) -> IntArray:
    """Return int64 ``[num_layers, num_ranks]``; where they were not counted, as many as the assignments are of."""
    return -(-batch.counts.sum(axis=2) // top_k) if batch.num_tokens is None else batch.num_tokens


def _check_limits(batches: Sequence[RecordedBatch], counts: IntArray, top_k: int) -> None:
    """Refuse an expert with more assignments than there are tokens: a token takes it once."""
    for batch, of_batch in zip(batches, counts, strict=True):
        tokens = _tokens(batch, top_k)
        above = np.argwhere(of_batch.max(axis=2) > tokens)
        if len(above):
            layer, rank = above[0]
            raise ValueError(
                f"{batch.where}: layer {batch.layers[layer]}: an expert has {of_batch[layer, rank].max()} of "
                f"{of_batch[layer, rank].sum()} assignments, more than there are tokens with {top_k} experts each "
                f"({tokens[layer, rank]})"
            )


def _paths(batches: Sequence[RecordedBatch], layers: IntArray) -> dict[Cell, IntArray]:
    paths: dict[Cell, IntArray] = {}
    for number, batch in enumerate(batches):
        for place, layer in enumerate(layers):
            for rank, ids in enumerate(batch.ids[layer] if batch.ids is not None else []):
                paths[number, place, rank] = ids
    return paths
