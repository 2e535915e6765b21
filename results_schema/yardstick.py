"""What the machine's yardstick tells: the rounds in which it moved, for who measures and who reports."""

from __future__ import annotations

from collections.abc import Iterable

#: A yardstick that took longer at one end of a round than at the other by more than this share has moved.
MOVED = 0.1


def has_moved(moments: Iterable[tuple[float, float]]) -> bool:
    """Tell whether the machine's speed changed in a round by more than :data:`MOVED`.

    Args:
        moments: at the round's beginning and end, what the product and the copy took on the slowest rank, in s.
    """
    return any(max(taken) > (1 + MOVED) * min(taken) for taken in zip(*moments, strict=True))
