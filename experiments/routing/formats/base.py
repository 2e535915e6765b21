"""What all formats of recorded routing have in common: batches one after the other, and how wrong ones are refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.routing.trace import RecordedRouting
from harmoeny.placement import IntArray

#: So many bytes at the start of a file decide which format it is.
_HEAD_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a file does not say, and what of it is wanted.

    Attributes:
        num_experts: experts per layer; None: as many as the file has room for or, where it lists chosen experts, one
            more than the highest.
        top_k: experts per token; needed where only counts are recorded.
        case: the series of a file that holds several.
        phase: ``prefill`` or ``decode``, of recordings that tell the two apart.
    """

    num_experts: int | None = None
    top_k: int | None = None
    case: str | None = None
    phase: str = "decode"


@dataclass(frozen=True)
class RecordedBatch:
    """The routing of one batch, whatever the recorder calls one: a step, a forward pass, a window, a request.

    Attributes:
        where: file and row that it was read from, for messages.
        layers: the recorder's names of the layers, in order.
        counts: int64 ``[num_layers, num_ranks, num_experts]``, assignments.
        num_tokens: int64 ``[num_layers, num_ranks]``; None: not recorded.
        top_k: experts per token; None: not recorded.
        ids: by layer and rank int64 ``[num_tokens, top_k]``, the experts of every token, -1 for none; None: only counts
            were recorded.
    """

    where: str
    layers: Sequence[str]
    counts: IntArray
    num_tokens: IntArray | None = None
    top_k: int | None = None
    ids: Sequence[Sequence[IntArray]] | None = None


@dataclass(frozen=True)
class Sample:
    """The beginning of a file, by which its format is recognised.

    Attributes:
        path: the file.
        head: its first bytes.
    """

    path: Path
    head: bytes = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> Sample:
        """Read the beginning of a file.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            return cls(path, file.read(_HEAD_BYTES))

    @cached_property
    def text(self) -> str:
        """The beginning as text without what it may start with (spaces, a byte order mark); empty: it is none."""
        if b"\0" in self.head:
            return ""
        return self.head.decode("utf-8-sig", errors="ignore").lstrip()

    @cached_property
    def tensors(self) -> Any:
        """What ``torch.save`` stored, tensors on the CPU and plain data alone; None: it is no such file."""
        return load_tensors(self.path) if self.head.startswith(b"PK\x03\x04") else None


class TraceFormat(ABC):
    """A format that somebody records routing in."""

    name: ClassVar[str]
    description: ClassVar[str]

    @abstractmethod
    def matches(self, sample: Sample) -> bool:
        """Tell by its content whether a file has this format."""

    @abstractmethod
    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield the batches of all files in order; no more than one batch of a text file is held at a time.

        Raises:
            ValueError: a file is damaged or contradicts itself or another; file and row are named.
        """

    def write(self, trace: RecordedRouting, path: Path) -> None:  # noqa: ARG002  (for formats that others read)
        """Write a trace in this format.

        Raises:
            ValueError: nobody reads files of this format but we.
        """
        raise ValueError(f"--to: {self.name!r} is only read")


def load_tensors(path: Path) -> Any:
    """Return what ``torch.save`` stored: tensors and plain data; code is never run.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no readable file of torch.save with tensors alone ({reason})") from error


def batch_of_counts(where: str, layers: Sequence[str], counts: Any) -> RecordedBatch:
    """Return a batch of which only the counts over all ranks were recorded.

    Args:
        where: file and row.
        layers: names of the layers.
        counts: ``[num_layers, num_experts]``, whole numbers of any type.

    Raises:
        ValueError: they have another shape, or are no whole numbers of at least 0.
    """
    try:
        values = np.asarray(counts)
    except ValueError:
        values = np.empty(0)
    if values.ndim != 2 or values.shape[0] != len(layers) or values.shape[1] < 1:
        raise ValueError(f"{where}: counts of shape {list(values.shape)}, must be [{len(layers)} layers, experts]")
    if values.dtype.kind not in "iuf" or (values != np.floor(values)).any() or (values < 0).any():
        raise ValueError(f"{where}: counts of type {values.dtype}, must be whole numbers of at least 0")
    return RecordedBatch(where, layers, values.astype(np.int64)[:, None, :])


def batch_of_ids(
    where: str, layers: Sequence[str], ids: Sequence[Sequence[IntArray]], num_experts: int | None
) -> RecordedBatch:
    """Return a batch of which the experts of every token were recorded.

    Args:
        where: file and row.
        layers: names of the layers.
        ids: by layer and rank int64 ``[num_tokens, top_k]``.
        num_experts: experts per layer; None: one more than the highest of this batch.

    Raises:
        ValueError: an expert that the layer does not have, or that a token has twice; another number of experts per
            token in one layer than in another.
    """
    highest = max((int(i.max(initial=-1)) for of_layer in ids for i in of_layer), default=-1)
    width = num_experts or highest + 1
    if highest >= width:
        raise ValueError(f"{where}: expert {highest}, must be below {width} (--num-experts)")
    counts = np.zeros((len(layers), len(ids[0]), width), dtype=np.int64)
    for layer, of_layer in enumerate(ids):
        for rank, chosen in enumerate(of_layer):
            if chosen.min(initial=0) < -1:
                raise ValueError(f"{where}: layer {layers[layer]}: expert {chosen.min()}, must be at least 0, or -1")
            ordered = np.sort(chosen, axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError(f"{where}: layer {layers[layer]}: a token has an expert twice")
            counts[layer, rank] = np.bincount(chosen[chosen >= 0], minlength=width)
    num_tokens = np.array([[len(chosen) for chosen in of_layer] for of_layer in ids], dtype=np.int64)
    widths = {chosen.shape[1] for of_layer in ids for chosen in of_layer}
    if len(widths) > 1:
        raise ValueError(f"{where}: tokens have {sorted(widths)} experts, must all have the same number")
    return RecordedBatch(where, layers, counts, num_tokens, widths.pop(), ids)


def ids_of(where: str, rows: Any, top_k: int | None = None) -> IntArray:
    """Return the experts of tokens, int64 ``[num_tokens, top_k]``, from a list of lists.

    Raises:
        ValueError: tokens have different numbers of experts, or these are no whole numbers.
    """
    try:
        chosen = np.array(rows if len(rows) else np.empty((0, top_k or 1)), dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        chosen = np.empty(0, dtype=np.int64)
    if chosen.ndim != 2 or (top_k is not None and chosen.shape[1] != top_k):
        wanted = "as many for every token" if top_k is None else f"{top_k} for every token"
        raise ValueError(f"{where}: experts of tokens must be lists of whole numbers, {wanted}")
    return chosen
