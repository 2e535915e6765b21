"""Keys and values of sequences of different lengths in one batch, which others join and leave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def only_keys_and_values(config: Any) -> bool:
    """Tell whether a model keeps the keys and values of all tokens in all layers, and nothing else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class RunningSequences:
    """The sequences of one rank that get further tokens; shorter ones are padded on the left.

    Attributes:
        cache: their keys and values, ``[batch_size, num_heads, longest, head_dim]`` per layer; None: there are none.
        lengths: int64 ``[batch_size]``, tokens of every sequence, on the CPU.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def add(self, cache: Any, num_sequences: int, length: int) -> None:
        """Let sequences of one length join, behind those that are there.

        Args:
            cache: their keys and values.
            num_sequences: how many.
            length: tokens of each.
        """
        self.lengths = torch.cat([self.lengths, torch.full((num_sequences,), length)])
        if self.cache is None:
            self.cache = cache
            return
        layers = zip(self.cache, cache, strict=True)
        self.cache = _cache((_stacked(a[0], b[0]), _stacked(a[1], b[1])) for a, b in layers)

    def keep(self, rows: list[int]) -> None:
        """Let all sequences but some leave.

        Args:
            rows: places of those that stay, ascending.
        """
        if len(rows) == len(self.lengths):
            return
        self.lengths = self.lengths[rows]
        if not rows:
            self.cache = None
            return
        longest = int(self.lengths.max())
        self.cache = _cache((layer[0][rows, :, -longest:], layer[1][rows, :, -longest:]) for layer in self.cache)

    def next_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return what a model needs to know of the next token of every sequence, and count that token.

        Returns:
            ``position_ids``, int64 ``[batch_size, 1]``, and, where lengths differ, ``attention_mask``, int64
            ``[batch_size, longest + 1]``.
        """
        positions = self.lengths[:, None].to(device)
        self.lengths = self.lengths + 1
        longest, shortest = int(self.lengths.max()), int(self.lengths.min())
        if longest == shortest:
            return {"position_ids": positions}
        mask = torch.arange(longest) >= longest - self.lengths[:, None]
        return {"position_ids": positions, "attention_mask": mask.to(torch.int64).to(device)}


def _cache(layers: Iterable[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(layers)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Return two batches of keys or values as one, ``[batch_size, num_heads, longest, head_dim]``."""
    longest = max(first.shape[2], second.shape[2])
    return torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in (first, second)])
