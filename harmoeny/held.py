"""Shares of a batch where every expert is executed by the ranks that hold it."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs


@compiled
def free_slots(home: IntArray, resident: BoolArray, room: int) -> IntArray:
    """Return int64 ``[world_size]``, the slots of every rank that hold no resident.

    Args:
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        room: slots of a rank, at least as many as there are experts whose home it is; 0: those.
    """
    num_experts, world_size = resident.shape
    homes = np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        homes[home[expert]] += 1
    held = num_held(resident)
    free: IntArray = np.empty(world_size, dtype=np.int64)
    for rank in range(world_size):
        free[rank] = max(max(room, homes[rank]) - held[rank], 0)
    return free


@compiled
def num_held(resident: BoolArray) -> IntArray:
    """Return int64 ``[world_size]``, how many experts every rank holds; ``resident``: ``[num_experts, world_size]``."""
    num_experts, world_size = resident.shape
    held: IntArray = np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        for rank in range(world_size):
            held[rank] += resident[expert, rank]
    return held


@compiled
def shares_at_home(counts: IntArray, home: IntArray) -> IntArray:
    """Return int64 ``[world_size, num_experts]``: every assignment is executed on its expert's home rank.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
    """
    world_size, num_experts = counts.shape
    shares = np.zeros((world_size, num_experts), dtype=np.int64)
    for expert in range(num_experts):
        total = 0
        for rank in range(world_size):
            total += counts[rank, expert]
        shares[home[expert], expert] = total
    return shares


@compiled
def shares_where_held(counts: IntArray, home: IntArray, resident: BoolArray, costs: Costs) -> IntArray:
    """Execute assignments where they are if the rank holds the expert, else on the least loaded rank that does.

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
    total, copies = np.zeros(num_experts, dtype=np.int64), np.zeros(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        for rank in range(world_size):
            copies[expert] += resident[expert, rank]
            total[expert] += counts[rank, expert]
    slice_s = costs.weights_s if costs.grouped else costs.launch_s + costs.weights_s
    for choice in (False, True):  # those that one rank holds first
        for expert in range(num_experts):
            whole_s = total[expert] * costs.token_s
            if (copies[expert] > 1) != choice or total[expert] == 0 or (choice and whole_s > slice_s):
                continue
            rank = home[expert]
            if choice:
                for other in range(world_size):
                    if resident[expert, other] and busy_s[other] < busy_s[rank]:
                        rank = other
            shares[rank, expert] = total[expert]
            load[rank] += total[expert]
            busy_s[rank] += max(whole_s, slice_s)
    for expert in range(num_experts):
        if copies[expert] < 2 or total[expert] * costs.token_s <= slice_s:
            continue
        left = 0
        for rank in range(world_size):
            if resident[expert, rank]:
                shares[rank, expert] = counts[rank, expert]
                load[rank] += counts[rank, expert]
            else:
                left += counts[rank, expert]
        _fill(shares[:, expert], load, resident[expert], left)
    return shares


@compiled
def _fill(share: IntArray, load: IntArray, holds: BoolArray, left: int) -> None:
    """Give what is left of an expert to its holders with the least load, evening out their loads as water does."""
    world_size = len(load)
    order = np.argsort(load, kind="mergesort")
    taking = below = 0
    for i in range(world_size):
        rank = order[i]
        if not holds[rank]:
            continue
        if taking > 0 and load[rank] * taking - below >= left:
            break
        taking += 1
        below += load[rank]
    even, extra = divmod(below + left, max(taking, 1))
    given = 0
    for i in range(world_size):
        rank = order[i]
        if holds[rank] and given < taking:
            amount = even + (1 if given < extra else 0) - load[rank]
            share[rank] += amount
            load[rank] += amount
            given += 1
