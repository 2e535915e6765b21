"""Places experts by what past batches needed: homes that even out the ranks, copies of hot experts in free slots."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.predict import Costs, FloatArray

#: What a swap of two homes has to lower the busiest rank's time by, as a share of it: every swap copies two experts, so
#: that few swaps and many are tried.
LEAST_SWAPS = (0.01, 0.001)


def placements_for(counts: FloatArray, present: Placement, num_slots: IntArray, costs: Costs) -> list[Placement]:
    """Return placements that may suit batches like these better than the present one, which is not among them.

    Homes are swapped between ranks as long as that makes the slowest one faster. Slots that are left hold either what
    their own rank has most assignments of, which saves exchange, or copies of the experts with the highest load per
    copy on the least busy ranks, which evens out.

    Args:
        counts: float64 ``[world_size, num_experts]``, mean assignments of typical batches.
        present: the present residency.
        num_slots: int64 ``[world_size]``, experts that every rank has room for, at least those whose home it is.
        costs: the machine's.
    """
    total = counts.sum(axis=0)
    found: list[Placement] = []
    for least_swap in LEAST_SWAPS:
        home = swap_homes(total, present.home, present.world_size, least_swap, costs)
        homes = Placement.from_home(home, present.world_size)
        free = num_slots - homes.resident.sum(axis=0)
        found.append(homes)
        if free.max(initial=0) > 0:
            found += [
                Placement(home=home, resident=copy_own(counts, homes.resident, free)),
                Placement(home=home, resident=copy_hottest(total, homes.resident, free)),
            ]
    return [placement for placement in found if not np.array_equal(placement.resident, present.resident)]


@compiled
def swap_homes(load: FloatArray, home: IntArray, world_size: int, least_swap: float, costs: Costs) -> IntArray:
    """Swap homes between the busiest rank and others, the best swap first; every rank keeps its number of experts.

    Args:
        load: float64 ``[num_experts]``, expected assignments.
        home: int64 ``[num_experts]``, the present homes.
        world_size: number of ranks.
        least_swap: what a swap has to lower the busiest rank's time by, as a share of it.
        costs: the machine's.

    Returns:
        int64 ``[num_experts]``.
    """
    num_experts = len(home)
    swapped = home.copy()
    expert_s = np.zeros(num_experts)
    for expert in range(num_experts):
        # A row travels there and back; weights are read if there is one.
        read_s = min(load[expert], 1.0) * costs.weights_s
        expert_s[expert] = max(load[expert] * (costs.token_s + 2 * costs.exchange_token_s), read_s)
    busy_s = np.zeros(world_size)
    for expert in range(num_experts):
        busy_s[swapped[expert]] += expert_s[expert]
    for _ in range(num_experts):
        giver = busy_s.argmax()
        best_s, give, take = busy_s[giver] * (1 - least_swap), -1, -1
        for mine in range(num_experts):
            if swapped[mine] != giver:
                continue
            for theirs in range(num_experts):
                gain_s = expert_s[mine] - expert_s[theirs]
                other = swapped[theirs]
                if other == giver or gain_s <= 0:
                    continue
                larger_s = max(busy_s[giver] - gain_s, busy_s[other] + gain_s)
                if larger_s < best_s:
                    best_s, give, take = larger_s, mine, theirs
        if give < 0:
            break
        gain_s = expert_s[give] - expert_s[take]
        other = swapped[take]
        busy_s[giver] -= gain_s
        busy_s[other] += gain_s
        swapped[give], swapped[take] = other, giver
    return swapped


def copy_own(counts: FloatArray, resident: BoolArray, free: IntArray) -> BoolArray:
    """Fill free slots with the experts that their own rank has most assignments of.

    Args:
        counts: float64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        free: int64 ``[world_size]``, free slots.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    filled = resident.copy()
    for rank in range(len(free)):
        wanted = np.where(resident[:, rank], -1, counts[rank])
        filled[np.argsort(-wanted, kind="stable")[: free[rank]], rank] = True
    return filled


@compiled
def copy_hottest(load: FloatArray, resident: BoolArray, free: IntArray) -> BoolArray:
    """Fill free slots, one copy after the other: the expert with the highest load per copy, on the least busy rank.

    Args:
        load: float64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``, one rank each.
        free: int64 ``[world_size]``, free slots.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    num_experts, world_size = resident.shape
    filled, left = resident.copy(), free.copy()
    copies, busy = np.zeros(num_experts, dtype=np.int64), np.zeros(world_size)
    for expert in range(num_experts):
        copies[expert] = resident[expert].sum()
        for rank in range(world_size):
            busy[rank] += filled[expert, rank] * load[expert] / copies[expert]
    for _ in range(left.sum()):
        best_expert, best_rank = -1, -1
        for expert in range(num_experts):
            if best_expert >= 0 and load[expert] / copies[expert] <= load[best_expert] / copies[best_expert]:
                continue
            taker = -1
            for rank in range(world_size):
                if left[rank] > 0 and not filled[expert, rank] and (taker < 0 or busy[rank] < busy[taker]):
                    taker = rank
            if taker >= 0:
                best_expert, best_rank = expert, taker
        if best_rank < 0:
            break
        before, after = load[best_expert] / copies[best_expert], load[best_expert] / (copies[best_expert] + 1)
        for rank in range(world_size):
            if filled[best_expert, rank]:
                busy[rank] += after - before
        busy[best_rank] += after
        filled[best_expert, best_rank] = True
        copies[best_expert] += 1
        left[best_rank] -= 1
    return filled
