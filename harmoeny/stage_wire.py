"""What the exchange of every stage takes, which depends on who sends whom how many of its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import by_expert, executed_by, largest
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.level_nodes import MOST_AT_ONCE
from harmoeny.lines import Stages, only_stage, stage_at
from harmoeny.placement import FloatArray, IntArray
from harmoeny.plan import find_moves
from harmoeny.predict import Costs, Loads
from harmoeny.stages import Lines
from harmoeny.wire import slowest_s

#: Of an expert that several ranks execute.
_SEVERAL = -1


class Columns(NamedTuple):
    """Counts and shares with the ranks of an expert beside each other; of no size where nobody asks for them.

    Attributes:
        counts: int64 ``[num_experts, world_size]``, assignments per expert and source rank.
        shares: int64 ``[num_experts, world_size]``, assignments that every rank executes.
        taker: int64 ``[num_experts]``, the rank that executes all of an expert's, -1 where there are several.
    """

    counts: IntArray
    shares: IntArray
    taker: IntArray


@inlined
def counts_nodes(world_size: int, costs: Costs) -> bool:
    """Return whether what a stage sends inside nodes and between them is counted, and not only what it sends."""
    return bool(0 < costs.node_ranks < world_size <= MOST_AT_ONCE)


@compiled
def columns_of(counts: IntArray, shares: IntArray, costs: Costs) -> Columns:
    """Return both (int64 ``[world_size, num_experts]``) by expert, if they are asked for on this machine."""
    world_size, num_experts = counts.shape
    if not counts_nodes(world_size, costs):
        none = np.empty((0, 0), dtype=np.int64)
        return Columns(none, none, np.empty(0, dtype=np.int64))
    executed, found = np.zeros((num_experts, world_size), dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    taker, is_taken = np.zeros(num_experts, dtype=np.int64), np.zeros(num_experts, dtype=np.bool_)
    for rank in range(world_size):
        for i in range(executed_by(rank, shares, found)):
            expert = found[i]
            executed[expert, rank] = shares[rank, expert]
            taker[expert] = _SEVERAL if is_taken[expert] else rank
            is_taken[expert] = True
    return Columns(by_expert(counts), executed, taker)


@compiled
def stages_wire_s(
    lines: Lines,
    counts: IntArray,
    shares: IntArray,
    columns: Columns,
    stages: Stages,
    loads: Loads,
    exchange_s: float,
    costs: Costs,
) -> FloatArray:
    """Return float64 ``[num_stages]``, what the exchange of every stage takes one way, in seconds.

    Args:
        lines: what every rank executes.
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        columns: both by expert.
        stages: when.
        loads: what the ranks do.
        exchange_s: what one exchange of everything would take one way.
        costs: the machine's.
    """
    if counts_nodes(len(counts), costs):
        return _between_nodes_s(columns, stages, costs)
    rows = _most_rows(lines, counts, shares, stages)
    # All that an exchange takes beside its latency goes by the rows of the busiest rank.
    row_s = (exchange_s - costs.exchange_latency_s) / max(largest(loads.sent), largest(loads.received), 1)
    for stage in range(len(rows)):
        rows[stage] = costs.exchange_latency_s + rows[stage] * row_s if rows[stage] > 0 else 0.0
    return rows


@compiled
def _most_rows(lines: Lines, counts: IntArray, shares: IntArray, stages: Stages) -> FloatArray:
    """Return float64 ``[num_stages]``, the most rows that a rank sends or receives at every stage.

    What is sent is exact where all ranks that get rows of an expert execute it at one stage; else it is in proportion.
    """
    (world_size, num_experts), num_stages = counts.shape, len(stages.cuts) - 1
    moved, rows = np.zeros((2, num_stages, world_size)), np.zeros(num_stages)
    arriving, ends = np.zeros((num_experts, num_stages + 1)), np.full((2, num_experts), -1)
    _add_most(rows, moved, arriving, ends, lines, counts, shares, stages)
    return rows


@borrowing
def _add_most(
    rows: FloatArray,
    moved: FloatArray,
    arriving: FloatArray,
    ends: IntArray,
    lines: Lines,
    counts: IntArray,
    shares: IntArray,
    stages: Stages,
) -> None:
    """Find the most rows of every stage; the last four as of :func:`stages_wire_s`.

    Args:
        rows: float64 ``[num_stages]``, zeros; becomes what :func:`_most_rows` returns.
        moved: float64 ``[2, num_stages, world_size]``, zeros; becomes what every rank sends, and what it receives.
        arriving: float64 ``[num_experts, num_stages + 1]``, zeros; becomes an expert's rows that travel, last all.
        ends: int64 ``[2, num_experts]``, all -1; becomes the first and the last stage at which these travel.
        lines: what every rank executes.
        counts: int64 ``[world_size, num_experts]``.
        shares: int64 ``[world_size, num_experts]``.
        stages: when.
    """
    (world_size, num_experts), cuts = counts.shape, stages.cuts
    num_stages, sent, received, first, last = len(rows), moved[0], moved[1], ends[0], ends[1]
    for rank in range(world_size):
        for i in range(lines.numbers[rank]):
            expert = lines.experts[rank, i]
            share = shares[rank, expert]
            more = share - counts[rank, expert]
            if more <= 0:
                continue
            begin = stages.begins[expert, rank]
            end, stage = begin + share, stage_at(cuts, rank, begin)
            arriving[expert, num_stages] += more
            if first[expert] < 0 or stage < first[expert]:
                first[expert] = stage
            if end <= cuts[stage + 1, rank]:
                received[stage, rank] += more
                arriving[expert, stage] += more
                last[expert] = max(last[expert], stage)
                continue
            while begin < end:
                stop = min(end, cuts[stage + 1, rank])
                part = more * (stop - begin) / share
                received[stage, rank] += part
                arriving[expert, stage] += part
                begin = stop
                stage += 1
            last[expert] = max(last[expert], stage - 1)
    for expert in range(num_experts):
        stage = first[expert]
        if stage < 0:
            continue
        if stage == last[expert]:  # as for most
            for rank in range(world_size):
                sent[stage, rank] += max(counts[rank, expert] - shares[rank, expert], 0)
        else:
            for rank in range(world_size):
                less = max(counts[rank, expert] - shares[rank, expert], 0)
                for stage in range(first[expert], last[expert] + 1):
                    sent[stage, rank] += less * arriving[expert, stage] / arriving[expert, num_stages]
    for stage in range(num_stages):
        for rank in range(world_size):
            rows[stage] = max(rows[stage], sent[stage, rank], received[stage, rank])


class _Sent(NamedTuple):
    """Rows that travel at every stage.

    Attributes:
        sent: int64 ``[num_stages, num_nodes, world_size(src)]``, by the node that they go to.
        received: int64 ``[2, num_stages, world_size(dst)]``, from inside the node, or beyond it.
        node_ranks: ranks of a node.
    """

    sent: IntArray
    received: IntArray
    node_ranks: int


@compiled
def _between_nodes_s(columns: Columns, stages: Stages, costs: Costs) -> FloatArray:
    """Return float64 ``[num_stages]``, what the exchange of every stage takes one way between ranks of several nodes.

    What they send and receive inside their node and beyond it is beside each other, and counted exactly, as
    :func:`harmoeny.plan.pairs_of_shares` does it: how much of either there is in a stage has little to do with how many
    rows it has.
    """
    (num_experts, world_size), node_ranks = columns.counts.shape, int(costs.node_ranks)
    num_stages, num_nodes = len(stages.cuts) - 1, -(-world_size // node_ranks)
    rows = _Sent(
        np.zeros((num_stages, num_nodes, world_size), dtype=np.int64),
        np.zeros((2, num_stages, world_size), dtype=np.int64),
        node_ranks,
    )
    moves = np.empty((5, 2 * world_size), dtype=np.int64)
    for expert in range(num_experts):
        counts, dst = columns.counts[expert], columns.taker[expert]
        if dst == _SEVERAL:
            _add_dealt(rows, moves, counts, columns.shares[expert], stages.begins[expert], stages.cuts)
            continue
        share, begin = columns.shares[expert, dst], stages.begins[expert, dst]
        if share == 0:
            continue
        stage = only_stage(stages.cuts, dst, begin, share)
        if stage < 0:
            for src in range(world_size):
                if src != dst and counts[src] > 0:
                    _add_parts(rows, counts[src], src, dst, begin, share, stages.cuts)
            continue
        first, inside = dst // node_ranks * node_ranks, -counts[dst]
        for src in range(world_size):
            rows.sent[stage, dst // node_ranks, src] += counts[src]
        rows.sent[stage, dst // node_ranks, dst] -= counts[dst]
        for src in range(first, min(first + node_ranks, world_size)):
            inside += counts[src]
        rows.received[0, stage, dst] += inside
        rows.received[1, stage, dst] += share - counts[dst] - inside
    wire_s = np.zeros(num_stages)
    for stage in range(num_stages):
        inside, beyond = rows.received[0, stage].max(), rows.received[1, stage].max()
        for src in range(world_size):
            sent = -rows.sent[stage, src // node_ranks, src]
            inside = max(inside, -sent)
            for node in range(num_nodes):
                sent += rows.sent[stage, node, src]
            beyond = max(beyond, sent)
        if max(inside, beyond) > 0:
            wire_s[stage] = slowest_s(inside, beyond, costs)
    return wire_s


@compiled
def _add_dealt(
    rows: _Sent, moves: IntArray, counts: IntArray, shares: IntArray, begins: IntArray, cuts: IntArray
) -> None:
    """Add the rows of an expert that several ranks execute.

    Args:
        rows: updated.
        moves: as of :func:`harmoeny.plan.find_moves`; overwritten.
        counts: int64 ``[world_size]``, its assignments per source rank.
        shares: int64 ``[world_size]``, how many of them every rank executes.
        begins: int64 ``[world_size]``, where they begin in the ranks' lines.
        cuts: as of :class:`Stages`.
    """
    for i in range(find_moves(moves, counts, shares, rows.node_ranks)):
        src, dst, number = moves[0, i], moves[1, i], moves[2, i]
        stage = only_stage(cuts, dst, begins[dst], shares[dst])
        if stage < 0:
            _add_parts(rows, number, src, dst, begins[dst], shares[dst], cuts)
            continue
        node = dst // rows.node_ranks  # as for most
        rows.sent[stage, node, src] += number
        rows.received[int(src // rows.node_ranks != node), stage, dst] += number


@inlined
def _add_parts(rows: _Sent, number: int, src: int, dst: int, begin: int, share: int, cuts: IntArray) -> None:
    """Add so many rows of an expert that one rank sends another, at the stages that have parts of it there.

    Args:
        rows: updated.
        number: how many.
        src: the sender.
        dst: the receiver.
        begin: where the expert begins in the receiver's line.
        share: how many of the expert's rows the receiver executes.
        cuts: as of :class:`Stages`.
    """
    node = dst // rows.node_ranks
    beyond = int(src // rows.node_ranks != node)
    stage, before, stop = stage_at(cuts, dst, begin), 0, begin
    while stop < begin + share:
        stop = min(begin + share, cuts[stage + 1, dst])
        until = number if stop == begin + share else number * (stop - begin) // share
        rows.sent[stage, node, src] += until - before
        rows.received[beyond, stage, dst] += until - before
        before = until
        stage += 1
