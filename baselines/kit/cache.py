"""Systems whose ranks hold fewer experts than are at home there: slots are a cache, the rest is in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harmoeny.choices import Knowledge
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement, hold_highest
from harmoeny.plan import Plan, home_executed, home_tokens
from harmoeny.policy import Policy

#: Batches after which who used an expert last is forgotten.
_REMEMBERED = 64


@dataclass(kw_only=True)
class CachePolicy(Policy):
    """Executes every expert on its home rank, which holds ``num_slots`` of its experts: at first the first ones.

    A subclass says what ranks execute on their hosts (:meth:`on_host`); what else they lack they fetch. What stays in
    the slots it says with :meth:`Policy.retain`.
    """

    small_memory: ClassVar[bool] = True
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT, Knowledge.HISTORY})

    @property
    def caches(self) -> bool:
        """True."""
        return True

    @property
    def history_window(self) -> int:
        """Batches that a cache remembers."""
        return _REMEMBERED

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Execute ``counts`` (int64 ``[world_size, num_experts]``) at home, from slots, fetched, or on the host."""
        executed = home_executed(counts, placement)
        host = self.on_host(executed, placement)
        needed = (executed > 0) & ~placement.resident
        return Plan(home_tokens(counts, placement.home), needed & ~host, host=host)

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return bool ``[num_experts, world_size]``, what ranks execute on their hosts.

        Args:
            executed: int64 ``[num_experts, world_size]``, assignments that every rank executes.
            placement: the experts that it holds.
        """
        raise NotImplementedError


def filled_with(wanted: BoolArray, placement: Placement, num_slots: int) -> Placement | None:
    """Return a placement with what is wanted, and what else is there where there is room; None: the present one.

    Args:
        wanted: bool ``[num_experts, world_size]``, at most ``num_slots`` of every rank.
        placement: the present residency.
        num_slots: slots of a rank.
    """
    first = np.where(wanted.any(axis=1), 1.0, 0.0)
    return placement.with_residents(hold_highest(first, wanted | placement.resident, num_slots))


def recency(history: Sequence[IntArray], placement: Placement, *, most_last: bool) -> FloatArray:
    """Score experts by their last use: the later, the higher; those that were never used come last, residents first.

    Args:
        history: int64 ``[world_size, num_experts]`` per batch, oldest first.
        placement: the present residency.
        most_last: whether, within a batch, those with more tokens were used later, or earlier.

    Returns:
        float64 ``[num_experts]``.
    """
    num_experts = placement.num_experts
    batch = np.full(num_experts, -1, dtype=np.int64)
    tokens = np.zeros(num_experts, dtype=np.int64)
    for age in range(1, min(len(history), _REMEMBERED) + 1):
        used = history[-age].sum(axis=0)
        new = (batch < 0) & (used > 0)
        batch[new], tokens[new] = len(history) - age, used[new]
        if (batch >= 0).all():
            break
    resident = placement.resident.any(axis=1) & (batch < 0)
    order = np.lexsort((np.arange(num_experts)[::-1], tokens if most_last else -tokens, resident, batch))
    scores = np.empty(num_experts)
    scores[order] = np.arange(num_experts, dtype=np.float64)
    return scores
