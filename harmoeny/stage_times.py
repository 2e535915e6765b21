"""Predicts what a layer in stages takes, whose exchange is behind the products of other stages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import largest
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.lines import Stages, no_stages, stage_at
from harmoeny.placement import BoolArray, FloatArray, IntArray
from harmoeny.predict import SLICES, Costs, Loads, Sources, add_slice, rest_s, work_s
from harmoeny.stage_number import MOST_STAGES, reads_most
from harmoeny.stage_wire import Columns, columns_of, stages_wire_s
from harmoeny.stages import Lines, cut_for, group, line_up

#: Which stages are tried: whether experts are cut where they are usually whole, and the other way round; and how many
#: more than seem enough. In this order most was gained in `experiment=grid`.
_TRIALS = ((False, 0), (True, -1), (True, 2), (False, 2))
#: What a trial takes, in seconds per rank and expert, on one node and on several (python -m scripts.bench.planning),
#: and the share of a layer's time that all but the first may take.
_TRIAL_S, _MOST_TRYING = (4e-9, 5e-9), 0.003


@inlined
def trial_s(counts: IntArray, costs: Costs) -> float:
    """Return what trying stages for these counts takes, in seconds."""
    return float(_TRIAL_S[int(costs.node_ranks > 0)] * counts.size)


@compiled
def soonest_stages(
    number: int,
    counts: IntArray,
    shares: IntArray,
    resident: BoolArray,
    loads: Loads,
    sources: Sources,
    exchange_s: float,
    whole_s: float,
    costs: Costs,
) -> tuple[Stages, float]:
    """Return stages and what a layer takes in them, in seconds: the soonest of as many as are worth trying.

    Args:
        number: how many stages seem enough.
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        resident: bool ``[num_experts, world_size]``, what it need not fetch.
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what one exchange of everything would take one way.
        whole_s: what the layer takes without stages.
        costs: the machine's.
    """
    lines, usually_whole = line_up(counts, shares, resident), reads_most(loads, costs)
    columns = columns_of(counts, shares, costs)
    best, best_s = no_stages(), np.inf
    for i in range(min(1 + int(_MOST_TRYING * whole_s / trial_s(counts, costs)), len(_TRIALS))):
        other, more = _TRIALS[i]
        num_stages = min(max(number + more, 2), MOST_STAGES)
        if usually_whole != other:
            stages = group(lines, shares, num_stages)
        else:
            stages = cut_for(lines, counts, shares, num_stages, loads, exchange_s, costs)
        then_s = staged_s(lines, counts, shares, columns, stages, loads, sources, exchange_s, costs)
        if then_s < best_s:
            best, best_s = stages, then_s
    return best, best_s


@compiled
def staged_s(
    lines: Lines,
    counts: IntArray,
    shares: IntArray,
    columns: Columns,
    stages: Stages,
    loads: Loads,
    sources: Sources,
    exchange_s: float,
    costs: Costs,
) -> float:
    """Return how long a layer in stages takes from the plan to the end of the combine, in seconds.

    One exchange follows the other, where there is something to exchange, the first while the rest is gathered. A rank
    computes a stage when its rows are there and were ordered, which own rows alone are already, and those of a single
    expert, and the one before is done. Results of a stage go back when all ranks have them, behind all rows. Fetched
    experts are computed at the end of each stage, when the last of them is there; slots for them are taken to be free
    in time, as some residents' rows are there soon.

    What processors do beside computing does not count: no latency of their exchanges is known, so they have no stages.

    Args:
        lines: what every rank executes.
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        columns: both by expert.
        stages: when.
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what one exchange of everything would take one way.
        costs: the machine's.
    """
    wire_s = stages_wire_s(lines, counts, shares, columns, stages, loads, exchange_s, costs)
    work = _stage_work(lines, counts, shares, stages, costs)
    return _through_s(work, wire_s, np.zeros((2, len(wire_s))), loads, sources, costs)


class _StageWork(NamedTuple):
    """What ranks do at every stage.

    Attributes:
        executed: int64 ``[num_stages, world_size]``, assignments.
        experts: int64 ``[num_stages, world_size]``, of how many experts these are.
        arrives: bool ``[num_stages, world_size]``, whether any of them are others'.
        rows: int64 ``[num_stages]``, assignments of all ranks.
        work: float64 ``[3, num_stages * world_size]``, computing them; rows as of :class:`Loads`.
        fetched: likewise, the fetched experts alone.
    """

    executed: IntArray
    experts: IntArray
    arrives: BoolArray
    rows: IntArray
    work: FloatArray
    fetched: FloatArray


@borrowing
def _through_s(
    stage_work: _StageWork, wire_s: FloatArray, seconds: FloatArray, loads: Loads, sources: Sources, costs: Costs
) -> float:
    """Return what :func:`staged_s` does, whose arguments the last three are.

    Args:
        stage_work: what ranks do.
        wire_s: float64 ``[num_stages]``, what the exchange of every stage takes one way.
        seconds: float64 ``[2, num_stages]``, zeros; becomes when a stage's rows are there, and when its results are.
        loads: what the ranks do.
        sources: what they fetch.
        costs: the machine's.
    """
    num_stages, world_size = stage_work.executed.shape
    arrived_s, end_s, rows = seconds[0], seconds[1], stage_work.rows
    gather_s = largest(loads.routed) * costs.copy_token_s
    all_rows = 0
    for stage in range(num_stages):
        all_rows += rows[stage]
    # The first rows that travel are on their way while the rest is gathered.
    first, first_rows = 0, rows[0]
    while first + 1 < num_stages and wire_s[first] == 0:
        first += 1
        first_rows += rows[first]
    now_s = gather_s * first_rows / max(all_rows, 1)
    for stage in range(num_stages):
        if stage == first + 1:
            now_s = max(now_s, gather_s)
        now_s += wire_s[stage]
        arrived_s[stage] = max(now_s, gather_s)
    now_s = arrived_s[num_stages - 1]
    for rank in range(world_size):
        rank_s = 0.0
        for stage in range(num_stages):
            rank_s = max(rank_s, arrived_s[stage])
            if stage_work.arrives[stage, rank] and stage_work.experts[stage, rank] > 1:
                rank_s += 2 * stage_work.executed[stage, rank] * costs.copy_token_s
            column = stage * world_size + rank
            if stage_work.fetched[SLICES, column] > 0:
                rank_s = _with_fetched_s(rank_s, stage_work.work, stage_work.fetched, column, sources, rank, costs)
            else:
                rank_s += work_s(stage_work.work, column, costs)
            end_s[stage] = max(end_s[stage], rank_s)
    # The last results to travel are added to the sum of all others, which is made while they are on their way.
    last, travelling, before_s = 0, 0, end_s[num_stages - 1]
    for stage in range(num_stages):
        if wire_s[stage] > 0:
            last, travelling = stage, travelling + 1
    for stage in range(num_stages):
        if stage == last:
            before_s = max(before_s, now_s)
        now_s = max(now_s, end_s[stage]) + wire_s[stage]
    add_s = 2 * gather_s
    last_s = add_s * rows[last] / max(all_rows, 1) if travelling > 1 else add_s
    again_s = last_s / 2 if travelling > 1 else 0.0  # what is added to is read and written once more
    now_s = max(before_s + add_s - last_s, now_s) + last_s + again_s
    return float(max(now_s, largest(sources.host_link_s)))


@compiled
def _stage_work(lines: Lines, counts: IntArray, shares: IntArray, stages: Stages, costs: Costs) -> _StageWork:
    """Return what ranks do at every stage; arguments as of :func:`staged_s`."""
    num_stages, world_size = len(stages.cuts) - 1, len(shares)
    numbers, work = np.zeros((2, num_stages, world_size), dtype=np.int64), np.zeros((2, 3, num_stages * world_size))
    arrives, rows = np.zeros((num_stages, world_size), dtype=np.bool_), np.zeros(num_stages, dtype=np.int64)
    stage_work = _StageWork(numbers[0], numbers[1], arrives, rows, work[0], work[1])
    _add_lines(stage_work, lines, counts, shares, stages, costs)
    return stage_work


@borrowing
def _add_lines(
    stage_work: _StageWork, lines: Lines, counts: IntArray, shares: IntArray, stages: Stages, costs: Costs
) -> None:
    """Add to ``stage_work``; the others as of :func:`staged_s`."""
    world_size, cuts = len(shares), stages.cuts
    for rank in range(world_size):
        for i in range(lines.numbers[rank]):
            expert = lines.experts[rank, i]
            arrives = shares[rank, expert] > counts[rank, expert]
            begin = stages.begins[expert, rank]
            end, stage = begin + shares[rank, expert], stage_at(cuts, rank, begin)
            while begin < end:
                part = min(end, cuts[stage + 1, rank]) - begin
                if part > 0:
                    column = stage * world_size + rank
                    stage_work.executed[stage, rank] += part
                    stage_work.experts[stage, rank] += 1
                    stage_work.arrives[stage, rank] |= arrives
                    stage_work.rows[stage] += part
                    add_slice(stage_work.work, column, part, 1, costs)
                    if i >= lines.num_held[rank]:
                        add_slice(stage_work.fetched, column, part, 1, costs)
                begin += part
                stage += 1


@inlined
def _with_fetched_s(
    begin_s: float, work: FloatArray, fetched: FloatArray, column: int, sources: Sources, rank: int, costs: Costs
) -> float:
    """Return when a rank has computed a stage that has fetched experts.

    Args:
        begin_s: when it begins.
        work: float64 ``[3, num_stages * world_size]``.
        fetched: likewise, the fetched experts' part of it.
        column: the stage's, at the rank.
        sources: where they come from.
        rank: the rank.
        costs: the machine's.
    """
    there_s = sources.ready_s[rank]
    turns_s = (sources.turns[rank] - 1) * costs.launch_s if costs.grouped > 0 else 0.0
    held_s = rest_s(work, fetched, column, costs)
    apart_s = max(begin_s + held_s, there_s) + work_s(fetched, column, costs) + turns_s
    if costs.grouped > 0 and sources.joins[rank]:
        apart_s = min(apart_s, max(begin_s, there_s) + work_s(work, column, costs))
    return float(apart_s)
