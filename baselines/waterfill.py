"""SGLang's waterfill: a model's shared expert is one more routed choice, and goes where the routed ones leave room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.static_ep import StaticEP
from harmoeny.choices import Knowledge
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray
from harmoeny.plan import deal

SPLITS = ("proportional", "least_moves")
#: How much more likely than any other rank a token's own one gets its shared expert, where both have as much room.
_OWN, _OTHER = 11, 10


@dataclass(kw_only=True)
class Waterfill(StaticEP):
    """Fills the ranks that have less routed load than others with shared experts of all ranks' tokens.

    Routed experts are executed at home. Source: SGLang, github.com/sgl-project/sglang, pull request 19290.

    Attributes:
        split: ``proportional``: every rank's tokens go to all ranks in proportion to their room below the even load, as
            published; ``least_moves``: no rank executes more than it has to, and no more tokens leave their rank than
            that takes.
        min_tokens: a rank with fewer tokens executes the shared experts of all of them itself.
    """

    name: ClassVar[str] = "waterfill"
    description: ClassVar[str] = "a model's shared expert goes to the ranks with the least routed load"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    split: str = "proportional"
    min_tokens: int = 64

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: an unknown split, or a negative number of tokens.
        """
        super().validate()
        if self.split not in SPLITS:
            raise ValueError(f"split: {self.split!r}, must be one of {', '.join(SPLITS)}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens: {self.min_tokens}, must be at least 0")

    def place_shared(self, num_tokens: IntArray, load: IntArray, num_shared: int) -> IntArray:
        """Return int64 ``[world_size(src), world_size(dst)]``, tokens; see :meth:`Policy.place_shared`."""
        moving = np.where(num_tokens < self.min_tokens, 0, num_tokens)
        staying = num_tokens - moving
        filled = load + num_shared * staying
        split = in_proportion if self.split == "proportional" else with_least_moves
        pairs: IntArray = split(moving, filled, num_shared)
        return pairs + np.diag(staying)


@compiled
def in_proportion(num_tokens: IntArray, load: IntArray, num_shared: int) -> IntArray:
    """Spread every rank's tokens over all in proportion to their room below the even load, somewhat more on its own.

    A rank's room is ``max(ceil((sum(load) + num_shared * sum(num_tokens)) / world_size) - load, 0)``, and 10 / 11 of
    that for tokens of others. Where SGLang draws a rank for every token, its expectation is rounded here.

    Args:
        num_tokens: int64 ``[world_size]``, tokens per source rank.
        load: int64 ``[world_size]``, what every rank executes beside them.
        num_shared: shared experts per token, at least 1.

    Returns:
        int64 ``[world_size(src), world_size(dst)]``, tokens.
    """
    world_size = len(load)
    pairs = np.zeros((world_size, world_size), dtype=np.int64)
    target = (load.sum() + num_shared * num_tokens.sum() + world_size - 1) // world_size
    room = np.maximum(target - load, 0)
    for src in range(world_size):
        weights = _OTHER * room
        weights[src] = _OWN * room[src]
        pairs[src] = np.roll(_parts(num_tokens[src], np.roll(weights, -src)), src)
    return pairs


@compiled
def with_least_moves(num_tokens: IntArray, load: IntArray, num_shared: int) -> IntArray:
    """Move as few tokens as the least largest load takes, to other ranks in proportion to the room that they have left.

    Args:
        num_tokens: int64 ``[world_size]``, tokens per source rank.
        load: int64 ``[world_size]``, what every rank executes beside them.
        num_shared: shared experts per token, at least 1.

    Returns:
        int64 ``[world_size(src), world_size(dst)]``, tokens.
    """
    world_size, total = len(load), num_tokens.sum()
    pairs = np.zeros((world_size, world_size), dtype=np.int64)
    limit = max(_level(load, num_shared, total), load.max())
    room = (limit - load) // num_shared
    shares = np.minimum(num_tokens, room)
    room -= shares
    shares += _parts(total - shares.sum(), room)
    deal(pairs, np.arange(len(pairs)), num_tokens, shares, 0)
    return pairs


@compiled
def _parts(number: int, weights: IntArray) -> IntArray:
    """Split a number in proportion to weights (int64 ``[world_size]``, not all 0); sums of first parts round down."""
    ends: IntArray = number * np.cumsum(weights) // max(weights.sum(), 1)
    ends[1:] -= ends[:-1].copy()
    return ends


@compiled
def _level(load: IntArray, num_shared: int, num_tokens: int) -> int:
    """Return the least level up to which ranks have room for so many tokens."""
    low, high = int(load.min()), int(load.max()) + num_shared * num_tokens
    while low < high:
        middle = (low + high) // 2
        if (np.maximum(middle - load, 0) // num_shared).sum() >= num_tokens:
            high = middle
        else:
            low = middle + 1
    return low
