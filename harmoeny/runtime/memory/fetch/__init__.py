"""Fetch strategies: how a rank gets at the weights of the experts that it executes. One file each, one interface."""

from __future__ import annotations

from collections.abc import Sequence

from harmoeny.choices import Fetch
from harmoeny.placement import Placement
from harmoeny.policy import Policy, places_anew
from harmoeny.runtime.memory.fetch.base import FetchOptions, FetchStrategy, RankMemory
from harmoeny.runtime.memory.fetch.none import NoFetch
from harmoeny.runtime.memory.fetch.overlapped import AsyncFetch
from harmoeny.runtime.memory.fetch.peer import PeerFetch
from harmoeny.runtime.memory.fetch.sync import SyncFetch
from harmoeny.shared import slots_of


def make_fetcher(policy: Policy, placements: Sequence[Placement], memory: RankMemory) -> FetchStrategy:
    """Build the strategy that a policy asks for on this rank; all ranks do it together.

    Args:
        policy: names the strategy and its options.
        placements: residency per layer before the first batch.
        memory: shared by the systems of this rank.

    Raises:
        ValueError: the strategy is unknown or does not go with the placement.
    """
    rooms = [slots_of(policy, placement) for placement in placements]
    options = FetchOptions(placements, rooms, policy.work_order, moves=places_anew(policy))
    for strategy in (NoFetch, SyncFetch, AsyncFetch, PeerFetch):
        if policy.fetch == strategy.name:
            return strategy(memory, options)
    raise ValueError(f"fetch: {policy.fetch!r}, must be one of {', '.join(Fetch)}")
