"""Places experts by what past batches needed: homes that even out the ranks, copies of hot experts in free slots."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import totals_of
from harmoeny.compiled import compiled
from harmoeny.packing import copies_by_load, longest_first, renumber
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement
from harmoeny.predict import Costs
from harmoeny.wire import nodes

#: What a swap of two homes has to lower the busiest rank's time by, as a share of it: every swap copies two experts, so
#: that few swaps and many are tried.
LEAST_SWAPS = (0.01, 0.001)


def placements_for(counts: FloatArray, present: Placement, num_slots: IntArray, costs: Costs) -> list[Placement]:
    """Return placements that may suit batches like these better than the present one, which is not among them.

    Homes stay, or are swapped between ranks as long as that makes the slowest one faster. Slots that are left hold
    either what their own rank has most assignments of, which saves exchange, or copies of the experts with the highest
    load per copy on the least busy ranks, which evens out. Or everything is packed anew, which copies most experts.

    Args:
        counts: float64 ``[world_size, num_experts]``, mean assignments of typical batches.
        present: the present residency.
        num_slots: int64 ``[world_size]``, experts that every rank has room for, at least those whose home it is.
        costs: the machine's.
    """
    expert_s, node = expected_s(counts.sum(axis=0), costs), nodes(present.world_size, costs)
    found: list[Placement] = []
    for home in (present.home, *(swap_homes(expert_s, present.home, len(node), least) for least in LEAST_SWAPS)):
        homes = Placement.from_home(home, present.world_size)
        free = num_slots - homes.resident.sum(axis=0)
        found.append(homes)
        if free.max(initial=0) > 0:
            found += [
                Placement(home=home, resident=copy_own(counts, homes.resident, free)),
                Placement(home=home, resident=copy_hottest(counts, homes.resident, free, node)),
            ]
    if num_slots.min() == num_slots.max():
        found.append(pack_anew(expert_s, present, int(num_slots[0])))
        found += pack_nodes(counts, present, int(num_slots[0]), costs)
    return [placement for placement in found if not np.array_equal(placement.resident, present.resident)]


@compiled
def expected_s(load: FloatArray, costs: Costs) -> FloatArray:
    """Return float64 ``[num_experts]``, how long a rank that executes all of an expert is busy with it.

    Args:
        load: float64 ``[num_experts]``, mean assignments.
        costs: the machine's.
    """
    expert_s = np.empty(len(load))
    for expert in range(len(load)):
        # A row travels there and back; weights are read if there is one, and arrivals are taken for Poisson's.
        read_s = (1 - np.exp(-load[expert])) * costs.weights_s
        expert_s[expert] = max(load[expert] * (costs.token_s + 2 * costs.exchange_token_s), read_s)
    return expert_s


def pack_anew(expert_s: FloatArray, present: Placement, num_slots: int) -> Placement:
    """Return copies by load, packed longest first onto ranks that are numbered such that much stays.

    Args:
        expert_s: float64 ``[num_experts]``, the time of each.
        present: the present residency.
        num_slots: experts that every rank has room for, which all together hold each at least once.
    """
    world_size = present.world_size
    num_slots = min(num_slots, len(expert_s))
    copies = copies_by_load(expert_s, world_size * num_slots, world_size)
    resident, _ = longest_first(expert_s, copies, world_size, num_slots)
    resident = renumber(resident, present.resident)
    return Placement(home=_choose_homes(resident, present.home), resident=resident)


def pack_nodes(counts: FloatArray, present: Placement, num_slots: int, costs: Costs) -> list[Placement]:
    """Return placements for several nodes: what every node's own ranks want most, and all experts over all ranks.

    A few slots of every rank hold what is packed over all ranks by the load that is left to them; the others hold what
    is executed for the rank's own node, so that it does not cross the network.

    Args:
        counts: float64 ``[world_size, num_experts]``, mean assignments.
        present: the present residency.
        num_slots: experts that every rank has room for.
        costs: the machine's.
    """
    world_size, num_experts = counts.shape
    node_ranks = int(costs.node_ranks)
    if node_ranks == 0:
        return []
    of_node = np.add.reduceat(counts, np.arange(0, world_size, node_ranks), axis=0)
    found = []
    least = -(-num_experts // world_size)
    for shared in range(least, min(num_slots, least + 2)):
        hottest = np.argsort(-of_node, axis=1, kind="stable")[:, : (num_slots - shared) * node_ranks]
        left = of_node.copy()
        np.put_along_axis(left, hottest, 0.0, axis=1)
        everywhere = pack_anew(expected_s(left.sum(axis=0), costs), present, shared)
        resident = everywhere.resident.copy()
        for number, load in enumerate(of_node):
            own = slice(number * node_ranks, (number + 1) * node_ranks)
            _hold_near(load, resident[:, own], num_slots)
        found.append(Placement(everywhere.home, resident))
    return found


@compiled
def _hold_near(load: FloatArray, resident: BoolArray, num_slots: int) -> None:
    """Fill a node's slots with what its own ranks have most assignments of, on as many ranks as these take.

    Args:
        load: float64 ``[num_experts]``, assignments of its ranks.
        resident: bool ``[num_experts, num_ranks]``, what they hold; updated.
        num_slots: experts that every rank has room for.
    """
    num_ranks = resident.shape[1]
    even, busy = max(load.sum() / num_ranks, 1.0), np.zeros(num_ranks)
    free = num_slots - totals_of(resident)
    for expert in np.argsort(-load, kind="mergesort"):
        copies = min(int(np.ceil(load[expert] / even)), num_ranks)
        for rank in range(num_ranks):
            if resident[expert, rank]:
                copies -= 1
        for _ in range(copies):
            taker = _least_busy(busy, free, resident[expert])
            if taker < 0:
                break
            resident[expert, taker] = True
            free[taker] -= 1
            busy[taker] += min(load[expert], even)


@compiled
def _least_busy(busy: FloatArray, free: IntArray, holds: BoolArray) -> int:
    """Return the rank with least to do that has a free slot and lacks an expert, or -1; all are ``[num_ranks]``."""
    taker = -1
    for rank in range(len(busy)):
        if free[rank] > 0 and not holds[rank] and (taker < 0 or busy[rank] < busy[taker]):
            taker = rank
    return taker


@compiled
def _choose_homes(resident: BoolArray, present: IntArray) -> IntArray:
    """Return int64 ``[num_experts]``: the present homes where they still hold their expert, else who has fewest."""
    num_experts, world_size = resident.shape
    home, homes = np.full(num_experts, -1, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        if resident[expert, present[expert]]:
            home[expert] = present[expert]
            homes[home[expert]] += 1
    for expert in range(num_experts):
        if home[expert] >= 0:
            continue
        for rank in range(world_size):
            if resident[expert, rank] and (home[expert] < 0 or homes[rank] < homes[home[expert]]):
                home[expert] = rank
        homes[home[expert]] += 1
    return home


@compiled
def swap_homes(expert_s: FloatArray, home: IntArray, world_size: int, least_swap: float) -> IntArray:
    """Swap homes between the busiest rank and others, the best swap first; every rank keeps its number of experts.

    Args:
        expert_s: float64 ``[num_experts]``, the time of each.
        home: int64 ``[num_experts]``, the present homes.
        world_size: number of ranks.
        least_swap: what a swap has to lower the busiest rank's time by, as a share of it.

    Returns:
        int64 ``[num_experts]``.
    """
    num_experts = len(home)
    swapped = home.copy()
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
def copy_hottest(counts: FloatArray, resident: BoolArray, free: IntArray, node: IntArray) -> BoolArray:
    """Fill free slots, copy after copy: the expert with the highest load per copy, on the least busy rank.

    Every node fills its own slots with what its own ranks have assignments of, so that these need not leave it.

    Args:
        counts: float64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        free: int64 ``[world_size]``, free slots.
        node: int64 ``[world_size]``, the node of every rank, ascending.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    world_size = len(node)
    filled = resident.copy()
    first = 0
    while first < world_size:
        end = first
        while end < world_size and node[end] == node[first]:
            end += 1
        _copy_inside(counts[first:end].sum(axis=0), filled[:, first:end], free[first:end].copy())
        first = end
    return filled


@compiled
def _copy_inside(load: FloatArray, filled: BoolArray, left: IntArray) -> None:
    """Fill one node's free slots.

    Args:
        load: float64 ``[num_experts]``, assignments of its ranks.
        filled: bool ``[num_experts, num_ranks]``, what they hold; updated.
        left: int64 ``[num_ranks]``, free slots; updated.
    """
    num_experts, num_ranks = filled.shape
    share, copies, busy = load.copy(), np.zeros(num_experts, dtype=np.int64), np.zeros(num_ranks)
    for expert in range(num_experts):
        copies[expert] = filled[expert].sum()
        share[expert] = load[expert] / max(copies[expert], 1)
        for rank in range(num_ranks):
            busy[rank] += filled[expert, rank] * share[expert]
    while left.sum() > 0:
        expert = int(share.argmax())
        if share[expert] < 0:
            break
        taker = _least_busy(busy, left, filled[expert])
        if taker < 0:  # nor will there be one later
            share[expert] = -1.0
            continue
        copies[expert] += 1
        after = load[expert] / copies[expert]
        for rank in range(num_ranks):
            if filled[expert, rank]:
                busy[rank] += after - share[expert]
        busy[taker] += after
        filled[expert, taker] = True
        left[taker] -= 1
        share[expert] = after


def renew_copies(expected: FloatArray, present: Placement, num_slots: IntArray, most: int, costs: Costs) -> BoolArray:
    """Return the residents with up to ``most`` other copies on every rank, those with the least load in exchange.

    Args:
        expected: float64 ``[world_size, num_experts]``, assignments that are expected.
        present: the present residency; homes stay.
        num_slots: int64 ``[world_size]``, experts that every rank has room for.
        most: copies per rank.
        costs: the machine's.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    resident, world_size = present.resident.copy(), present.world_size
    share = expected.sum(axis=0) / present.resident.sum(axis=1)
    free = np.minimum(num_slots - resident.sum(axis=0), most)
    for rank in range(world_size):
        copies = np.flatnonzero(resident[:, rank] & (present.home != rank))
        given = copies[np.argsort(share[copies], kind="stable")][: most - free[rank]]
        resident[given, rank] = False
        free[rank] += len(given)
    return copy_hottest(expected, resident, free, nodes(world_size, costs))
