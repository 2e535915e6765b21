"""What all measured rounds share: the order of the systems, and no garbage collection while the clock runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harmoeny.runtime.layer.system import System


def in_turn(systems: Sequence[System], round_index: int) -> list[System]:
    """Return the systems in the order of a round: rotated by one each time, so that each takes every turn."""
    turn = round_index % len(systems)
    return [*systems[turn:], *systems[:turn]]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect garbage now, and not again in this block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
