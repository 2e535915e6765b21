"""Where a rank executes what it does not hold: fetched on its device, or on its host, whichever ends sooner."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, FloatArray, IntArray

#: Of so many experts of a rank, at most, all choices are tried.
_FEW = 6
#: Experts of a rank, at most, that change places one by one: that takes time in proportion to their cube.
_MOST_EXCHANGED = 16
#: What an exchange of places has to gain, as a share of the time: rounding is none.
_LEAST_GAIN = 1e-9
#: What a fetch costs beside the wait for it, as a share of its time: it holds up others, and takes a slot.
_FETCH_WORTH = 0.025
#: Share of a copy that a batch has to have time for to bring it in any case: it ends behind the batch.
_MOST_OF_A_COPY = 0.5


class PlaceCosts(NamedTuple):
    """Seconds by the names of :class:`harmoeny.cost.ExpertCost`, where they decide who executes a slice."""

    token_s: float
    launch_s: float
    weights_s: float
    fetch_s: float
    host_token_s: float
    host_launch_s: float
    host_weights_s: float
    host_trip_s: float

    @classmethod
    def of(cls, cost: ExpertCost) -> PlaceCosts:
        """Return those of a machine."""
        return cls(*(float(getattr(cost, name)) for name in cls._fields))


@compiled
def device_slice_s(num_tokens: int, costs: PlaceCosts) -> float:
    """Return how long a slice of so many tokens takes on the device once its weights are there."""
    return float(costs.launch_s + max(num_tokens * costs.token_s, costs.weights_s))


@compiled
def host_slice_s(num_tokens: int, costs: PlaceCosts) -> float:
    """Return how long it takes on the host."""
    return float(costs.host_launch_s + max(num_tokens * costs.host_token_s, costs.host_weights_s))


@compiled
def places_end_s(tokens: IntArray, held: BoolArray, host: BoolArray, costs: PlaceCosts) -> float:
    """Return when a rank is done with its experts, on its device and on its host.

    The device executes what it holds, then what it fetches in the order of ``tokens``, each as soon as it is there.

    Args:
        tokens: int64 ``[n]``, assignments of every expert, at least 1.
        held: bool ``[n]``, whether it is in a slot.
        host: bool ``[n]``, whether the host executes it.
        costs: the machine's.
    """
    device_s = link_s = host_s = 0.0
    for i in range(len(tokens)):
        if host[i]:
            host_s += host_slice_s(tokens[i], costs)
        elif held[i]:
            device_s += device_slice_s(tokens[i], costs)
    for i in range(len(tokens)):
        if not host[i] and not held[i]:
            link_s += costs.fetch_s
            device_s = max(device_s, link_s) + device_slice_s(tokens[i], costs)
    return max(device_s, host_s + costs.host_trip_s if host_s > 0 else 0.0)


@compiled
def places_s(tokens: IntArray, held: BoolArray, host: BoolArray, costs: PlaceCosts) -> float:
    """Return what a choice is judged by: when the rank is done, and what its fetches cost others.

    Args:
        tokens: as for :func:`places_end_s`, and so the others.
        held: bool ``[n]``.
        host: bool ``[n]``.
        costs: the machine's.
    """
    num_fetches = 0
    for i in range(len(tokens)):
        num_fetches += not held[i] and not host[i]
    return places_end_s(tokens, held, host, costs) + num_fetches * _FETCH_WORTH * costs.fetch_s


@compiled
def choose_host(executed: IntArray, resident: BoolArray, costs: PlaceCosts) -> BoolArray:
    """Choose what the hosts execute, such that every rank is predicted to be done soonest.

    Of a few experts all choices are tried. Of more, those with the most tokens of what a rank lacks are fetched, and of
    those that it holds, the ones with the fewest may go to the host too: all numbers of both are tried. Then single
    experts change places for as long as that helps.

    Args:
        executed: int64 ``[num_experts, world_size]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``, what is in its slots.
        costs: the machine's; without any for the host it executes nothing.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    num_experts, world_size = executed.shape
    chosen = np.zeros((num_experts, world_size), dtype=np.bool_)
    if costs.host_token_s <= 0:
        return chosen
    for rank in range(world_size):
        active = np.flatnonzero(executed[:, rank])
        active = active[np.argsort(-executed[active, rank], kind="mergesort")]
        if len(active) == 0:
            continue
        tokens, held = executed[active, rank], resident[active, rank]
        if len(active) <= _FEW:
            host = _best_of_all(tokens, held, costs)
        else:
            host = _best_numbers(tokens, held, costs)
            _exchange_places(tokens, held, host, costs)
        for i in range(len(active)):
            chosen[active[i], rank] = host[i]
    return chosen


@compiled
def spare_copies(
    executed: IntArray, resident: BoolArray, host: BoolArray, costs: PlaceCosts, idle: FloatArray, batch: int
) -> IntArray:
    """Return int64 ``[world_size]``, experts that every rank's link can bring behind a batch.

    Where it fetches, as many as the link has time for beside that. Where others of its layers do, these would have to
    wait: a copy that has begun is not interrupted. So the more of them fetch, the fewer are brought. Where there is
    time for no whole number, some batches bring one more; one for most of which there is time is always brought.

    Args:
        executed: as for :func:`choose_host`, and so the others.
        resident: bool ``[num_experts, world_size]``.
        host: bool ``[num_experts, world_size]``, what hosts execute.
        costs: the machine's.
        idle: float64 ``[world_size]``, share of a rank's layers that fetched nothing of late.
        batch: number of the batch.
    """
    world_size = executed.shape[1]
    copies = np.zeros(world_size, dtype=np.int64)
    for rank in range(world_size):
        active = np.flatnonzero(executed[:, rank])
        held, here = resident[active, rank], host[active, rank]
        num_fetches = 0
        for i in range(len(active)):
            num_fetches += not held[i] and not here[i]
        rate = places_end_s(executed[active, rank], held, here, costs) / costs.fetch_s - num_fetches
        if num_fetches > 0:
            copies[rank] = int(rate)
            continue
        rate *= idle[rank]
        copies[rank] = int(np.floor((batch + 1) * rate) - np.floor(batch * rate))
        if rate >= _MOST_OF_A_COPY:
            copies[rank] = max(copies[rank], 1)
    return copies


@compiled
def _best_of_all(tokens: IntArray, held: BoolArray, costs: PlaceCosts) -> BoolArray:
    """Return the fastest of all choices of what the host executes; ``tokens`` (int64 ``[n]``) in descending order."""
    n = len(tokens)
    best_s, best = np.inf, 0
    host = np.zeros(n, dtype=np.bool_)
    for choice in range(1 << n):
        for i in range(n):
            host[i] = (choice >> i) & 1
        seconds = places_s(tokens, held, host, costs)
        if seconds < best_s:
            best_s, best = seconds, choice
    for i in range(n):
        host[i] = (best >> i) & 1
    return host


@compiled
def _best_numbers(tokens: IntArray, held: BoolArray, costs: PlaceCosts) -> BoolArray:
    """Return what the host executes with the best numbers of fetches, and of held experts that it takes over.

    Args:
        tokens: int64 ``[n]``, in descending order.
        held: bool ``[n]``.
        costs: the machine's.
    """
    mine, missing = np.flatnonzero(held), np.flatnonzero(~held)
    best_s, best_kept, best_fetched = np.inf, 0, 0
    host_held_s = kept_s = host_missing_all_s = 0.0
    for i in mine:
        kept_s += device_slice_s(tokens[i], costs)
    for i in missing:
        host_missing_all_s += host_slice_s(tokens[i], costs)
    for kept in range(len(mine), -1, -1):
        if kept < len(mine):
            kept_s -= device_slice_s(tokens[mine[kept]], costs)
            host_held_s += host_slice_s(tokens[mine[kept]], costs)
        device_s, host_s = kept_s, host_held_s + host_missing_all_s
        for fetched in range(len(missing) + 1):
            if fetched > 0:
                num_tokens = tokens[missing[fetched - 1]]
                device_s = max(device_s, fetched * costs.fetch_s) + device_slice_s(num_tokens, costs)
                host_s -= host_slice_s(num_tokens, costs)
            on_host = fetched < len(missing) or kept < len(mine)
            seconds = max(device_s, host_s + costs.host_trip_s if on_host else 0.0)
            seconds += fetched * _FETCH_WORTH * costs.fetch_s
            if seconds < best_s:
                best_s, best_kept, best_fetched = seconds, kept, fetched
    host = np.ones(len(tokens), dtype=np.bool_)
    host[mine[:best_kept]] = False
    host[missing[:best_fetched]] = False
    return host


@compiled
def _exchange_places(tokens: IntArray, held: BoolArray, host: BoolArray, costs: PlaceCosts) -> None:
    """Let single experts, and pairs of one on the host and one on the device, change places while that helps.

    Args:
        tokens: int64 ``[n]``, in descending order.
        held: bool ``[n]``.
        host: bool ``[n]``; updated.
        costs: the machine's.
    """
    n, helped = len(tokens), len(tokens) <= _MOST_EXCHANGED
    best_s = places_s(tokens, held, host, costs)
    while helped:
        helped = False
        for i in range(n):
            for j in range(i, n):
                if i != j and host[i] == host[j]:
                    continue
                host[i] = not host[i]
                if i != j:
                    host[j] = not host[j]
                seconds = places_s(tokens, held, host, costs)
                if seconds < best_s * (1 - _LEAST_GAIN):
                    best_s, helped = seconds, True
                else:
                    host[i] = not host[i]
                    if i != j:
                        host[j] = not host[j]
