"""Which experts a rank's slots of a layer hold between batches: pure data, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray

#: Content of a slot that holds no expert, and of one that a rank does not have.
EMPTY, NO_SLOT = -1, -2


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
    before, after = np.array(home), np.array([home])
    _replace_all(after, resident[:, None])
    home[:] = after[0].tolist()
    changed: list[int] = np.flatnonzero((after[0] != before) & (after[0] != EMPTY)).tolist()
    return changed


class SlotsOfAll:
    """What the slots of all ranks hold in a layer, as every rank can know."""

    def __init__(self, resident_EW: BoolArray, num_slots: int | None = None) -> None:
        """Begin with :func:`home_slots` of every rank.

        Args:
            resident_EW: bool ``[E, W]``, the experts that ranks should hold.
            num_slots: as for it.
        """
        homes = [home_slots(resident, num_slots) for resident in resident_EW.T]
        most = max(map(len, homes))
        self._home_WS: IntArray | None = np.array([home + [NO_SLOT] * (most - len(home)) for home in homes])
        self._num_experts = len(resident_EW)
        self._order_WE: IntArray | None = None

    def replace(self, resident_EW: BoolArray) -> None:
        """Change to other residents, as :func:`replace_residents` does."""
        if self._home_WS is not None:
            _replace_all(self._home_WS, resident_EW)
            self._order_WE = None

    def lose(self) -> None:
        """Be told that ranks changed what they hold for themselves."""
        self._home_WS = self._order_WE = None

    @property
    def order(self) -> IntArray | None:
        """Int64 ``[W, E]``, for every rank the experts in its slots, in their order, and then the others.

        None once that was lost.
        """
        if self._order_WE is None and self._home_WS is not None:
            self._order_WE = _experts_by_slot(self._home_WS, self._num_experts)
        return self._order_WE


@compiled
def _replace_all(home_WS: IntArray, resident_EW: BoolArray) -> None:
    """Change ``home_WS``, int64 ``[W, slots]``, to other residents; those that stay keep their slots."""
    num_experts, num_ranks = resident_EW.shape
    for rank in range(num_ranks):
        home = home_WS[rank]
        room = 0
        for slot in range(len(home)):
            if home[slot] != NO_SLOT:
                room += 1
        wanted, stays = np.zeros(num_experts, np.bool_), np.zeros(num_experts, np.bool_)
        for expert in range(num_experts):
            if resident_EW[expert, rank] and room > 0:
                wanted[expert] = True
                room -= 1
        for slot in range(len(home)):
            if home[slot] >= 0 and wanted[home[slot]]:
                stays[home[slot]] = True
        new = 0
        for slot in range(len(home)):
            if home[slot] == NO_SLOT or (home[slot] >= 0 and wanted[home[slot]]):
                continue
            while new < num_experts and (stays[new] or not wanted[new]):
                new += 1
            home[slot] = new if new < num_experts else EMPTY
            new += 1


@compiled
def _experts_by_slot(home_WS: IntArray, num_experts: int) -> IntArray:
    """Return int64 ``[W, E]``, :attr:`SlotsOfAll.order`."""
    num_ranks, num_slots = home_WS.shape
    order_WE = np.empty((num_ranks, num_experts), np.int64)
    for rank in range(num_ranks):
        held, place = np.zeros(num_experts, np.bool_), 0
        for slot in range(num_slots):
            expert = home_WS[rank, slot]
            if expert >= 0:
                held[expert] = True
                order_WE[rank, place] = expert
                place += 1
        for expert in range(num_experts):
            if not held[expert]:
                order_WE[rank, place] = expert
                place += 1
    return order_WE


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
