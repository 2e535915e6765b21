"""Which experts a rank's slots of a layer hold between batches: pure data, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from harmoeny.placement import BoolArray, IntArray

#: Content of a slot that holds no expert.
EMPTY = -1


def num_slots_needed(num_residents: IntArray, num_experts: int, num_slots: int | None = None) -> IntArray:
    """Return how many slots ranks need for a layer, int64, the shape of ``num_residents``.

    Args:
        num_residents: int64, experts that a rank should hold, of one rank or several.
        num_experts: experts in the layer; nobody needs more slots.
        num_slots: slots that were asked for, at least 1; None: one per resident, at least 1.
    """
    wanted = np.maximum(num_residents, 1) if num_slots is None else np.full_like(num_residents, num_slots)
    return np.minimum(wanted, num_experts)


def home_slots(resident: BoolArray, num_slots: int | None = None) -> list[int]:
    """Return what a rank's slots of a layer hold between batches: its first residents, ``EMPTY`` where there are none.

    Args:
        resident: bool ``[num_experts]``, the experts that the rank should hold.
        num_slots: slots, at least 1; None: as many as there are residents, at least 1.
    """
    room = int(num_slots_needed(resident.sum(), len(resident), num_slots))
    held: list[int] = np.flatnonzero(resident)[:room].tolist()  # as in with_slot, which is slower for one rank
    return held + [EMPTY] * (room - len(held))


def replace_residents(home: list[int], resident: BoolArray) -> list[int]:
    """Change ``home`` (see :func:`home_slots`) to other residents; those that stay keep their slots.

    Returns:
        The slots whose expert has to be copied in.
    """
    wanted = np.flatnonzero(resident)[: len(home)].tolist()
    new = deque(e for e in wanted if e not in home)
    changed = []
    for index, expert_id in enumerate(home):
        if expert_id not in wanted:
            home[index] = new.popleft() if new else EMPTY
            if home[index] != EMPTY:
                changed.append(index)
    return changed


def settled(content: Sequence[int], wanted: Iterable[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return what slots hold once they were brought to other residents, and the (expert, slot) to copy for that.

    Args:
        content: expert in every slot now; one may be in several.
        wanted: the residents, at most as many as there are slots count; what is in a slot already stays there.
    """
    missing = dict.fromkeys(sorted(wanted)[: len(content)])
    after = []
    for expert_id in content:
        after.append(expert_id if expert_id in missing else EMPTY)
        missing.pop(expert_id, None)
    free = (slot for slot, expert_id in enumerate(after) if expert_id == EMPTY)
    copies = list(zip(missing, free, strict=False))
    for expert_id, slot in copies:
        after[slot] = expert_id
    return after, copies
