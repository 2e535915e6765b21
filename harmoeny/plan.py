"""The plan of one MoE layer for one batch: which rank executes which assignments, and which weights move for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmoeny.compiled import compiled, inlined
from harmoeny.lines import Stages, stage_at, stage_tokens
from harmoeny.placement import BoolArray, IntArray, Placement


@dataclass(frozen=True)
class Plan:
    """Where every assignment of a batch is executed.

    Attributes:
        tokens: int64 ``[world_size(src), num_experts, world_size(dst)]``, assignments of source rank and expert that
            each destination rank executes.
        fetch: bool ``[num_experts, world_size]``, true where a rank must fetch the expert's weights first.
        from_peer: bool ``[num_experts, world_size]``, the fetches that other ranks send, the others come from host
            memory; only ``fetch=peer`` reads it. None: all.
        source_groups: groups of ranks, which hold every rank once, whose rows are executed apart as they arrive, after
            those of the rank itself; None: all rows of an expert are executed together, when all are there.
        predicted_s: seconds from the plan to the end of the combine, as the policy predicts them; None: it does not.
        host: bool ``[num_experts, world_size]``, what a rank executes on its host, from the store, beside its device;
            the weights stay where they are. None: nothing; must be None where the exchange has stages.
        stages: how every rank's rows are divided: those of one stage are exchanged together and executed while those of
            the next are on their way. None: one exchange; must be None where sources are grouped.
        senders: int64 ``[num_experts, world_size]``, who sends each of :attr:`from_peer`, -1 where nobody does: the
            expert's home rank, or a lower rank than the receiver that gets the expert from another, too, and hands it
            on. None: all home ranks.
        halved: bool ``[num_experts, world_size]``, of what peers send, the fetches of which only the first half of
            every matrix, by rows, comes from the sender, and the rest from host memory; who gets an expert like that
            hands it on to nobody. None: none.
        early: int64 ``[world_size, num_experts]``, assignments that ranks executed of their own before there was a
            plan; not among :attr:`tokens`. None: none; whoever executes plans sets it, never a policy.
    """

    tokens: IntArray
    fetch: BoolArray
    from_peer: BoolArray | None = None
    source_groups: Sequence[Sequence[int]] | None = None
    predicted_s: float | None = None
    host: BoolArray | None = None
    stages: Stages | None = None
    senders: IntArray | None = None
    halved: BoolArray | None = None
    early: IntArray | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(self.tokens.shape[0])

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer."""
        return int(self.tokens.shape[1])

    def executed(self) -> IntArray:
        """Return int64 ``[num_experts, world_size]``, assignments executed per expert and rank."""
        executed: IntArray = self.tokens.sum(axis=0)
        return executed

    def load(self) -> IntArray:
        """Return int64 ``[world_size]``, assignments executed per rank."""
        load: IntArray = self.tokens.sum(axis=(0, 1))
        return load

    def first_traffic(self) -> IntArray | None:
        """Return int64 ``[world_size(src), world_size(dst)]``, what is computed while the rest is on its way.

        None: everything is exchanged at once.
        """
        if self.stages is not None:
            executed = self.executed()
            bounds = self.stages.bounds(executed)[:2]
            first: IntArray = stage_tokens(self.tokens, bounds[:, None], executed)[0].sum(axis=1)
            return first
        return None if self.source_groups is None else np.diag(np.einsum("ses->s", self.tokens))

    def dropped(self, counts: IntArray) -> IntArray:
        """Return int64 ``[world_size, num_experts]``, assignments of ``counts`` that nobody executes."""
        dropped: IntArray = counts - self.tokens.sum(axis=2)
        return dropped if self.early is None else dropped - self.early

    def imbalance(self) -> float:
        """Return the largest load over the mean load; 1.0 is perfect, and the value where nothing is executed."""
        load = self.load()
        total = int(load.sum())
        return float(load.max()) * self.world_size / total if total else 1.0

    def validate(self, counts: IntArray, placement: Placement, *, exact: bool = True) -> None:
        """Check every invariant of a plan; meant for tests and set-up, not for the measured path.

        Args:
            counts: int64 ``[world_size, num_experts]``, the assignments that were planned.
            placement: the residency that the plan starts from.
            exact: every assignment must be executed; otherwise some may be dropped.

        Raises:
            ValueError: the first invariant that does not hold, with the place.
        """
        if self.tokens.shape != (*counts.shape, counts.shape[0]):
            raise ValueError(f"plan.tokens: shape {self.tokens.shape} does not fit counts {counts.shape}")
        if self.fetch.shape != self.tokens.shape[1:]:
            raise ValueError(f"plan.fetch: shape {self.fetch.shape}, must be {self.tokens.shape[1:]}")
        if (self.tokens < 0).any():
            raise ValueError(f"plan.tokens: negative at [src, expert, dst] = {_first(self.tokens < 0)}")
        if self.early is not None and (self.early < 0).any():
            raise ValueError(f"plan.early: negative at [rank, expert] = {_first(self.early < 0)}")
        dropped = self.dropped(counts)
        if (dropped < 0).any():
            raise ValueError(f"plan.tokens: more assignments than counted at [src, expert] = {_first(dropped < 0)}")
        if exact and dropped.any():
            raise ValueError(f"plan.tokens: assignments lost at [src, expert] = {_first(dropped != 0)}")
        host = self._validated_host()
        if self.stages is not None:
            self._validate_stages(self.stages)
        weightless = (self.executed() > 0) & ~placement.resident & ~self.fetch & ~host
        if weightless.any():
            raise ValueError(f"plan.fetch: executed without weights at [expert, rank] = {_first(weightless)}")
        needless = self.fetch & (placement.resident | (self.executed() == 0) | host)
        if needless.any():
            raise ValueError(f"plan.fetch: fetched without need at [expert, rank] = {_first(needless)}")
        self._validate_senders(placement)
        self._validate_halved(placement)

    def _validate_senders(self, placement: Placement) -> None:
        """Check :attr:`senders`."""
        if self.senders is None:
            return
        if self.from_peer is None or self.senders.shape != self.fetch.shape:
            raise ValueError(f"plan.senders: shape {self.senders.shape}, must be that of plan.from_peer")
        if (wrong := (self.senders >= 0) != self.from_peer).any():
            raise ValueError(f"plan.senders: not those of plan.from_peer at [expert, rank] = {_first(wrong)}")
        home = placement.home[:, None]
        earlier = (self.senders < np.arange(self.world_size)) & np.take_along_axis(
            self.from_peer, np.maximum(self.senders, 0), axis=1
        )
        if (wrong := self.from_peer & (self.senders != home) & ~earlier).any():
            raise ValueError(f"plan.senders: lacks the expert at [expert, rank] = {_first(wrong)}")

    def _validate_halved(self, placement: Placement) -> None:
        """Check :attr:`halved`."""
        if self.halved is None:
            return
        if self.halved.shape != self.fetch.shape:
            raise ValueError(f"plan.halved: shape {self.halved.shape}, must be {self.fetch.shape}")
        sent = self.fetch if self.from_peer is None else self.fetch & self.from_peer
        if (wrong := self.halved & ~sent).any():
            raise ValueError(f"plan.halved: sent by no peer at [expert, rank] = {_first(wrong)}")
        if self.senders is None:
            return
        handed_on = (self.senders >= 0) & (self.senders != placement.home[:, None])
        wrong = handed_on & np.take_along_axis(self.halved, np.maximum(self.senders, 0), axis=1)
        if wrong.any():
            raise ValueError(f"plan.halved: handed on by who has half at [expert, rank] = {_first(wrong)}")

    def _validated_host(self) -> BoolArray:
        """Return :attr:`host`, with nothing where it is None, after a check of it."""
        if self.host is None:
            return np.zeros_like(self.fetch)
        if self.host.shape != self.fetch.shape:
            raise ValueError(f"plan.host: shape {self.host.shape}, must be {self.fetch.shape}")
        idle = self.host & (self.executed() == 0)
        if idle.any():
            raise ValueError(f"plan.host: nothing to execute at [expert, rank] = {_first(idle)}")
        for name in ("source_groups", "stages"):
            if getattr(self, name) is not None and self.host.any():
                raise ValueError(f"plan.host: must be None with plan.{name}")
        return self.host

    def _validate_stages(self, stages: Stages) -> None:
        if self.source_groups is not None:
            raise ValueError("plan.stages: must be None with plan.source_groups")
        executed, load = self.executed(), self.load()
        if stages.begins.shape != executed.shape:
            raise ValueError(f"plan.stages.begins: shape {stages.begins.shape}, must be {executed.shape}")
        if stages.num_stages < 1 or stages.cuts.shape[1] != self.world_size:
            raise ValueError(
                f"plan.stages.cuts: shape {stages.cuts.shape}, must be [num_stages + 1, {self.world_size}]"
            )
        wrong = (np.diff(stages.cuts, axis=0) < 0).any(axis=0) | (stages.cuts[0] != 0) | (stages.cuts[-1] != load)
        if wrong.any():
            raise ValueError(f"plan.stages.cuts: do not go from 0 to all rows at [rank] = {_first(wrong)}")
        begins = np.where(executed > 0, stages.begins, load)
        order = np.argsort(begins, axis=0, kind="stable")
        rows = np.take_along_axis(executed, order, axis=0)
        wrong = (np.take_along_axis(begins, order, axis=0) != np.cumsum(rows, axis=0) - rows).any(axis=0)
        if wrong.any():
            raise ValueError(f"plan.stages.begins: experts lie on each other, or apart, at [rank] = {_first(wrong)}")


def _first(where: BoolArray) -> list[int]:
    return [int(i) for i in np.argwhere(where)[0]]


def plan_from_tokens(tokens: IntArray, placement: Placement) -> Plan:
    """Complete a plan: whatever a rank executes and does not hold, it fetches.

    Args:
        tokens: int64 ``[world_size(src), num_experts, world_size(dst)]``.
        placement: the residency that the plan starts from.
    """
    return Plan(tokens=tokens, fetch=_needed(tokens, placement.resident))


@compiled
def _needed(tokens: IntArray, resident: BoolArray) -> BoolArray:
    world_size, num_experts, _ = tokens.shape
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    for src in range(world_size):
        for expert in range(num_experts):
            for dst in range(world_size):
                if tokens[src, expert, dst] > 0 and not resident[expert, dst]:
                    fetch[expert, dst] = True
    return fetch


@compiled
def home_tokens(counts: IntArray, home: IntArray) -> IntArray:
    """Send every assignment to its expert's home rank.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.

    Returns:
        int64 ``[world_size(src), num_experts, world_size(dst)]``.
    """
    world_size, num_experts = counts.shape
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            tokens[src, expert, home[expert]] = counts[src, expert]
    return tokens


def home_executed(counts: IntArray, placement: Placement) -> IntArray:
    """Return int64 ``[num_experts, world_size]``, what ranks execute where every assignment goes home.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        placement: names the home ranks.
    """
    executed = np.zeros((placement.num_experts, placement.world_size), dtype=np.int64)
    executed[np.arange(placement.num_experts), placement.home] = counts.sum(axis=0)
    return executed


@compiled
def hand_over(row: IntArray, amount: int, room: IntArray, dst: int) -> int:
    """Give assignments of one sender and expert to the ranks that have room, one after another.

    Args:
        row: int64 ``[world_size(dst)]``, who executes them; updated.
        amount: how many.
        room: int64 ``[world_size(dst)]``, what every rank may still take; updated.
        dst: the rank to begin with; those before it have no room.

    Returns:
        The rank to go on with.
    """
    while amount > 0 and dst < len(room):
        n = min(amount, room[dst])
        row[dst] += n
        room[dst] -= n
        amount -= n
        if room[dst] == 0:
            dst += 1
    return dst


@compiled
def tokens_of_shares(counts: IntArray, shares: IntArray, node_ranks: int = 0) -> IntArray:
    """Decide which assignments make up the share of every rank, where policies care only for the loads.

    Every rank fills its share with its own assignments first, so that nothing is sent that may stay, and then with
    those of its node.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        shares: int64 ``[num_experts, world_size(dst)]``, assignments that every rank is to execute; their sums per
            expert are those of ``counts``.
        node_ranks: ranks of a node; 0: all.

    Returns:
        int64 ``[world_size(src), num_experts, world_size(dst)]``.
    """
    world_size, num_experts = counts.shape
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    columns, takers = np.arange(world_size), np.empty(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        takers[expert] = only_taker(shares, expert)
    for src in range(world_size):  # as for most experts: in order, without a view of anything
        for expert in range(num_experts):
            if takers[expert] >= 0:
                tokens[src, expert, takers[expert]] = counts[src, expert]
    for expert in range(num_experts):
        if takers[expert] < 0:
            deal(tokens[:, expert], columns, counts[:, expert], shares[expert], node_ranks)
    return tokens


@inlined
def only_taker(shares: IntArray, expert: int) -> int:
    """Return who executes all assignments of an expert, -1 where several ranks do; 0 where nobody has any.

    Args:
        shares: int64 ``[num_experts, world_size]``, assignments that every rank executes.
        expert: the expert.
    """
    number = takers = 0
    for rank in range(shares.shape[1]):
        takes = shares[expert, rank] > 0
        number += takes
        takers += rank if takes else 0
    return takers if number < 2 else -1


@compiled
def pairs_of_shares(counts: IntArray, shares: IntArray, stages: Stages, node_ranks: int = 0) -> IntArray:
    """Return the sums over the experts of every stage of :func:`tokens_of_shares`.

    Args:
        counts: as there.
        shares: as there.
        stages: as of a plan; of no size: there is one.
        node_ranks: as there.

    Returns:
        int64 ``[num_stages, world_size(src), world_size(dst)]``.
    """
    world_size, num_experts = counts.shape
    begins, cuts = stages.begins, stages.cuts
    num_stages = max(len(cuts) - 1, 1)
    pairs = np.zeros((world_size, num_stages * world_size), dtype=np.int64)
    ranks, of_expert = np.arange(world_size), np.empty((world_size, world_size), dtype=np.int64)
    columns = ranks.copy()
    for expert in range(num_experts):
        is_cut = False
        if len(cuts) > 0:
            for rank in range(world_size):
                rows = shares[expert, rank]
                stage = stage_at(cuts, rank, begins[expert, rank]) if rows > 0 else 0
                is_cut |= rows > 0 and begins[expert, rank] + rows > cuts[stage + 1, rank]
                columns[rank] = stage * world_size + rank
        if not is_cut:
            deal(pairs, columns, counts[:, expert], shares[expert], node_ranks)
            continue
        of_expert[:] = 0
        deal(of_expert, ranks, counts[:, expert], shares[expert], node_ranks)
        for rank in range(world_size):
            rows = shares[expert, rank]
            for stage in range(num_stages):
                begin = min(max(cuts[stage, rank] - begins[expert, rank], 0), rows)
                end = min(max(cuts[stage + 1, rank] - begins[expert, rank], 0), rows)
                if begin == end:
                    continue
                for src in range(world_size):
                    sent = of_expert[src, rank]
                    pairs[src, stage * world_size + rank] += sent * end // rows - sent * begin // rows
    by_stage = np.empty((num_stages, world_size, world_size), dtype=np.int64)
    for stage in range(num_stages):
        by_stage[stage] = pairs[:, stage * world_size : (stage + 1) * world_size]
    return by_stage


@compiled
def deal(pairs: IntArray, columns: IntArray, counts: IntArray, shares: IntArray, node_ranks: int) -> None:
    """Add one expert's assignments to who executes whose, as :func:`tokens_of_shares` decides it.

    Args:
        pairs: int64 ``[world_size(src), num_columns]``; updated.
        columns: int64 ``[world_size(dst)]``, where what every rank executes is added.
        counts: int64 ``[world_size]``, the expert's assignments per source rank.
        shares: int64 ``[world_size]``, how many of them every rank executes.
        node_ranks: ranks of a node; 0: all.
    """
    world_size = len(counts)
    takers = taker = 0
    for rank in range(world_size):
        if shares[rank] > 0:
            takers += 1
            taker = rank
    if takers < 2:  # as most experts have
        for src in range(world_size):
            pairs[src, columns[taker]] += counts[src]
        return
    moves = np.empty((5, 2 * world_size), dtype=np.int64)
    for rank in range(world_size):
        pairs[rank, columns[rank]] += min(counts[rank], shares[rank])
    for i in range(find_moves(moves, counts, shares, node_ranks)):
        pairs[moves[0, i], columns[moves[1, i]]] += moves[2, i]


@compiled
def find_moves(moves: IntArray, counts: IntArray, shares: IntArray, node_ranks: int) -> int:
    """Find which of one expert's assignments go to other ranks, and return how many pairs of ranks there are.

    Every rank keeps as many as it executes itself. The others go to ranks of the same node first.

    Args:
        moves: int64 ``[5, 2 * world_size]``; overwritten: source, destination and assignments of every pair, and what
            is needed to find them.
        counts: int64 ``[world_size]``, the expert's assignments per source rank.
        shares: int64 ``[world_size]``, how many of them every rank executes.
        node_ranks: ranks of a node; 0: all.
    """
    world_size, number, kept, left = len(counts), 0, moves[3], moves[4]
    for rank in range(world_size):
        own = min(counts[rank], shares[rank])
        kept[rank], left[rank] = counts[rank] - own, shares[rank] - own
    for size in (node_ranks, world_size):
        if size == 0:
            continue
        for first in range(0, world_size, size):
            end, dst = min(first + size, world_size), first
            for src in range(first, end):
                while kept[src] > 0 and dst < end:
                    n = min(kept[src], left[dst])
                    if n > 0:  # one of both is done then, so there are no more pairs than that
                        moves[0, number], moves[1, number], moves[2, number] = src, dst, n
                        number += 1
                        kept[src] -= n
                        left[dst] -= n
                    if left[dst] == 0:
                        dst += 1
    return number


@compiled
def even_shares(counts: IntArray, serving: BoolArray) -> IntArray:
    """Share every expert's assignments over the ranks that serve it; the shares differ by at most one.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        serving: bool ``[num_experts, world_size]``, at least one rank per expert.

    Returns:
        int64 ``[num_experts, world_size]``.
    """
    world_size, num_experts = counts.shape
    shares = np.zeros((num_experts, world_size), dtype=np.int64)
    totals = counts.sum(axis=0)
    first = 0  # replica that gets the first assignment left over: it moves on, so that no rank gets them all
    for expert in range(num_experts):
        copies = serving[expert].sum()
        share, extra = divmod(totals[expert], copies)
        replica = 0
        for rank in range(world_size):
            if serving[expert, rank]:
                shares[expert, rank] = share + (1 if (replica - first) % copies < extra else 0)
                replica += 1
        first += extra
    return shares
