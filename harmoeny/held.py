"""Shares of a batch where every expert is executed by the ranks that hold it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import totals_of
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs

#: How often experts are shared out again over the ranks that hold them, and what each time has to lower the largest
#: load by, as a share of it.
_MOST_ROUNDS = 16
_LEAST_ROUND = 1e-3
#: Ranks up to which putting one after the other in its place is the fastest way to order them.
_MOST_INSERTED = 16


class Slots(NamedTuple):
    """Where ranks keep the weights of a layer's experts.

    Attributes:
        number: int64 ``[world_size]``, every rank's slots.
        free: int64 ``[world_size]``, those that hold no resident.
    """

    number: IntArray
    free: IntArray


@compiled
def with_free(free: IntArray, resident: BoolArray) -> Slots:
    """Return the slots of ranks that have some beside those of their residents.

    Args:
        free: int64 ``[world_size]``.
        resident: bool ``[num_experts, world_size]``.
    """
    return Slots(free + totals_of(resident), free)


@compiled
def slots_in(room: int, home: IntArray, resident: BoolArray) -> Slots:
    """Return the slots of ranks that all have the same room.

    Args:
        room: slots of a rank, at least as many as there are experts whose home it is; 0: those.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
    """
    num_experts, world_size = resident.shape
    homes = np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        homes[home[expert]] += 1
    number = totals_of(resident)
    free = np.empty(world_size, dtype=np.int64)
    for rank in range(world_size):
        free[rank] = max(max(room, homes[rank]) - number[rank], 0)
        number[rank] += free[rank]
    return Slots(number, free)


@compiled
def shares_at_home(total: IntArray, home: IntArray, world_size: int) -> IntArray:
    """Return int64 ``[world_size, num_experts]``: every assignment is executed on its expert's home rank.

    Args:
        total: int64 ``[num_experts]``, assignments of every expert.
        home: int64 ``[num_experts]``.
        world_size: number of ranks.
    """
    shares: IntArray = np.zeros((world_size, len(total)), dtype=np.int64)
    for expert in range(len(total)):
        shares[home[expert], expert] = total[expert]
    return shares


@compiled
def shares_where_held(counts: IntArray, home: IntArray, resident: BoolArray, costs: Costs) -> IntArray:
    """Execute assignments where they are if the rank holds the expert, then on its node, else where least is to do.

    What is left to the holders of an expert evens out their loads; experts are taken up again, one after the other, as
    long as that lowers the largest load, since those that come first know nothing of those that follow.

    An expert with so few assignments that they take less time than its launch and its weights is never split: it is
    executed by the rank that holds it and has least to do, as every rank that reads its weights takes that time.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        costs: the machine's.

    Returns:
        int64 ``[world_size, num_experts]``, assignments that every rank executes.
    """
    world_size, num_experts = counts.shape
    shares = np.zeros((world_size, num_experts), dtype=np.int64)
    load, busy_s = np.zeros(world_size, dtype=np.int64), np.zeros(world_size)
    total = totals_of(counts)
    first, holders = holders_of(resident)
    slice_s = costs.weights_s if costs.grouped else costs.launch_s + costs.weights_s
    for choice in (False, True):  # those that one rank holds first
        for expert in range(num_experts):
            several = first[expert + 1] - first[expert] > 1
            whole_s = total[expert] * costs.token_s
            if several != choice or total[expert] == 0 or (choice and whole_s > slice_s):
                continue
            rank = home[expert]
            if choice:
                for other in holders[first[expert] : first[expert + 1]]:
                    if busy_s[other] < busy_s[rank]:
                        rank = other
            shares[rank, expert] = total[expert]
            load[rank] += total[expert]
            busy_s[rank] += max(whole_s, slice_s)
    split = np.empty(num_experts, dtype=np.int64)
    num_split = 0
    for expert in range(num_experts):
        if first[expert + 1] - first[expert] > 1 and total[expert] * costs.token_s > slice_s:
            split[num_split] = expert
            num_split += 1
    _share_out(shares, load, counts, total, split[:num_split], first, holders, int(costs.node_ranks))
    return shares


@compiled
def holders_of(resident: BoolArray) -> tuple[IntArray, IntArray]:
    """Return the ranks that hold every expert: int64 ``[num_experts + 1]``, where each one's begin, and int64, all."""
    num_experts, world_size = resident.shape
    first = np.zeros(num_experts + 1, dtype=np.int64)
    holders = np.empty(resident.sum(), dtype=np.int64)
    end = 0
    for expert in range(num_experts):
        for rank in range(world_size):
            if resident[expert, rank]:
                holders[end] = rank
                end += 1
        first[expert + 1] = end
    return first, holders


@compiled
def _share_out(
    shares: IntArray,
    load: IntArray,
    counts: IntArray,
    total: IntArray,
    split: IntArray,
    first: IntArray,
    holders: IntArray,
    node_ranks: int,
) -> None:
    """Share experts out over the ranks that hold them.

    Args:
        shares: int64 ``[world_size, num_experts]``; updated.
        load: int64 ``[world_size]``, what every rank executes; updated.
        counts: int64 ``[world_size, num_experts]``.
        total: int64 ``[num_experts]``, their sums.
        split: int64, the experts.
        first: as of :func:`holders_of`.
        holders: likewise.
        node_ranks: ranks of a node; 0: there is one.
    """
    world_size = len(load)
    near = np.zeros(len(holders), dtype=np.int64)  # what stays on its rank, or its node
    left = total.copy()
    for expert in split:
        begin, end = first[expert], first[expert + 1]
        while begin < end:
            last = begin + 1
            if node_ranks > 0:
                node = holders[begin] // node_ranks
                while last < end and holders[last] // node_ranks == node:
                    last += 1
            others = 0
            if node_ranks > 0:
                for rank in range(node * node_ranks, min((node + 1) * node_ranks, world_size)):
                    others += counts[rank, expert]
            for i in range(begin, last):
                near[i] = counts[holders[i], expert]
                load[holders[i]] += near[i]
                if node_ranks > 0:
                    others -= near[i]
            if others > 0:
                _fill(near[begin:last], load, holders[begin:last], others)
            for i in range(begin, last):
                shares[holders[i], expert] = near[i]
                left[expert] -= near[i]
            begin = last
    far = np.zeros(len(holders), dtype=np.int64)
    largest = np.iinfo(np.int64).max
    for _ in range(_MOST_ROUNDS):
        for expert in split:
            own = slice(first[expert], first[expert + 1])
            for i in range(first[expert], first[expert + 1]):
                load[holders[i]] -= far[i]
                far[i] = 0
            if left[expert] > 0:
                _fill(far[own], load, holders[own], left[expert])
        now = load.max()
        if now >= largest * (1 - _LEAST_ROUND):
            break
        largest = now
    for expert in split:
        for i in range(first[expert], first[expert + 1]):
            shares[holders[i], expert] = near[i] + far[i]


@compiled
def _fill(share: IntArray, load: IntArray, ranks: IntArray, left: int) -> None:
    """Give what is left of an expert to ranks with the least load, evening out their loads as water does.

    Args:
        share: int64 ``[num_ranks]``, the expert's assignments on each of them; updated.
        load: int64 ``[world_size]``, all of theirs; updated.
        ranks: int64 ``[num_ranks]``.
        left: assignments.
    """
    order = _by_load(load, ranks)
    taking = below = 0
    for i in order:
        if taking > 0 and load[ranks[i]] * taking - below >= left:
            break
        taking += 1
        below += load[ranks[i]]
    even, extra = divmod(below + left, taking)
    for given, i in enumerate(order[:taking]):
        amount = even + (1 if given < extra else 0) - load[ranks[i]]
        share[i] += amount
        load[ranks[i]] += amount


@compiled
def _by_load(load: IntArray, ranks: IntArray) -> IntArray:
    """Return int64 ``[num_ranks]``, the places of ``ranks``, also of that shape, by falling room: least load first."""
    if len(ranks) > _MOST_INSERTED:
        return np.argsort(load[ranks], kind="mergesort")
    order: IntArray = np.empty(len(ranks), dtype=np.int64)
    for i in range(len(ranks)):
        place = i
        while place > 0 and load[ranks[order[place - 1]]] > load[ranks[i]]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
    return order
