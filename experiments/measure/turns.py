"""What all measured rounds share: whose turn it is when, and no garbage collection while the clock runs."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def in_turn(items: Sequence[T], round_index: int, num_rounds: int) -> list[T]:
    """Return systems, or points, in the order of a round.

    It is drawn anew for every even round, the same on all ranks, and the odd round after it goes the other way (A B C,
    C B A): on average over the two everything is measured at the same time, so a drift that is linear cancels. The last
    of an odd number of rounds goes the other way than the one before, too.

    Args:
        items: what takes turns.
        round_index: the round; negative: a warm-up.
        num_rounds: rounds that are measured, at most.
    """
    pair, backward = min(round_index // 2, max(0, num_rounds // 2 - 1)), round_index % 2
    order = random.Random(pair).sample(list(items), len(items))  # noqa: S311  (no secret)
    return order[::-1] if backward else order


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect garbage now, and not again in this block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
