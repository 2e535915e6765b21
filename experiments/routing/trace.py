"""A recorded routing: per batch, MoE layer and rank the tokens of every expert and, if asked for, of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from harmoeny.placement import IntArray

#: Batch, MoE layer and rank: what one row of a recorded routing is of.
Cell = tuple[int, int, int]


@dataclass(frozen=True)
class RecordedRouting:
    """A recorded routing.

    Attributes:
        path: the file that it comes from.
        model: name of the model whose routing it is.
        dataset: name of the text, or of what else drove the routing.
        top_k: experts per token.
        num_tokens: int64 ``[num_batches, num_layers, world_size]``, tokens of every rank.
        counts: int64 ``[num_batches, num_layers, world_size, num_experts]``, assignments; their sum is below
            ``num_tokens * top_k`` where the model left assignments out.
        paths: by :data:`Cell` int64 ``[num_tokens, top_k]``, the experts of every token, -1 for none; empty: not
            recorded.
        stacks: per MoE layer, the stack that it belongs to; None: not known.
    """

    path: str
    model: str
    dataset: str
    top_k: int
    num_tokens: IntArray
    counts: IntArray
    paths: Mapping[Cell, IntArray] = field(default_factory=dict)
    stacks: list[int] | None = None

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return int(self.counts.shape[1])

    @property
    def world_size(self) -> int:
        """Number of ranks that the tokens were counted on; 1 also where that was not recorded."""
        return int(self.counts.shape[2])

    @property
    def num_experts(self) -> int:
        """Experts per MoE layer."""
        return int(self.counts.shape[3])

    def spread_tokens(self, batch: int, layer: int, world_size: int) -> IntArray:
        """Return int64 ``[world_size]``, tokens per rank when ``world_size`` ranks share those of a batch."""
        tokens: IntArray = self.num_tokens[batch, layer]
        if world_size == self.world_size:
            return tokens
        total = int(tokens.sum())
        shares: IntArray = np.full(world_size, total // world_size, dtype=np.int64)
        shares[: total % world_size] += 1
        return shares

    def spread_counts(self, batch: int, layer: int, world_size: int) -> IntArray:
        """Return int64 ``[world_size, num_experts]``, assignments when ``world_size`` ranks share those of a batch.

        On as many ranks as recorded it, every rank gets its own. On another number, tokens with paths are cut into
        equal pieces in the order of the recorded ranks; where there are only counts, every expert's assignments are
        dealt out one by one, so that all ranks get the same number up to one and nearly the same mix.
        """
        recorded: IntArray = self.counts[batch, layer]
        if world_size == self.world_size:
            return recorded
        if self.paths:
            pieces = [self.path_of(batch, layer, rank, world_size) for rank in range(world_size)]
            return np.stack([np.bincount(p[p >= 0], minlength=self.num_experts) for p in pieces]).astype(np.int64)
        ends = np.cumsum(recorded.sum(axis=0))
        # Assignment i goes to rank i mod world_size.
        dealt = (ends + world_size - 1 - np.arange(world_size)[:, None]) // world_size
        return np.diff(dealt, axis=1, prepend=0).astype(np.int64)

    def path_of(self, batch: int, layer: int, rank: int, world_size: int) -> IntArray:
        """Return int64 ``[num_tokens, top_k]``, the experts of the tokens of one of ``world_size`` ranks."""
        if world_size == self.world_size:
            return self.paths[batch, layer, rank]
        everyone = np.concatenate([self.paths[batch, layer, r] for r in range(self.world_size)])
        bounds = np.concatenate([[0], np.cumsum(self.spread_tokens(batch, layer, world_size))])
        return everyone[bounds[rank] : bounds[rank + 1]]
