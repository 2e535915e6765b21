"""What all measured rounds share: who begins, and that Python's garbage collector runs between calls, never inside."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harmoeny.runtime.layer.system import System


def in_turn(systems: Sequence[System], round_index: int) -> list[System]:
    """Return the systems in a round's order: another one begins every time, so that none always follows the same."""
    turn = round_index % len(systems)
    return [*systems[turn:], *systems[:turn]]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect garbage now, and not again inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
