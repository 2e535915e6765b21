"""Divides what ranks execute into stages, so that the exchange of one is behind the products of another.

Source: EPS-MoE, arXiv 2410.12247: groups of experts. Which rows are together is decided here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import compiled, inlined
from harmoeny.lines import Stages
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import Plan
from harmoeny.predict import Costs, Loads
from harmoeny.stage_number import lost_by_cut_s, slowest_work_s, weight

#: How far a cut moves rather than go through an expert where products take longer than the exchange, which then need
#: not be equally long on all ranks; a share of the smaller of the stages beside it.
_FARTHEST = 0.3


def in_stages(plan: Plan, num_stages: int | None) -> Plan:
    """Return a plan in so many stages; one that has stages already, or lets hosts execute, stays as it is.

    Args:
        plan: of any policy.
        num_stages: at least 1; None: what the policy decided.
    """
    has_host = plan.host is not None and bool(plan.host.any())
    if num_stages in (None, 1) or plan.source_groups is not None or plan.stages is not None or has_host:
        return plan
    counts, shares = plan.tokens.sum(axis=2), np.ascontiguousarray(plan.executed().T)
    return replace(plan, stages=group(line_up(counts, shares, ~plan.fetch), shares, num_stages))


class Lines(NamedTuple):
    """In which order ranks execute their experts.

    Attributes:
        experts: int64 ``[world_size, num_experts]``, those that a rank executes first, then anything.
        numbers: int64 ``[world_size]``, how many they are.
        num_held: int64 ``[world_size]``, how many of them need not be fetched; they come first.
    """

    experts: IntArray
    numbers: IntArray
    num_held: IntArray


@compiled
def line_up(counts: IntArray, shares: IntArray, resident: BoolArray) -> Lines:
    """Order what every rank executes.

    A rank's line has at both ends those experts of which fewest rows travel, as most are the rank's own, and at its
    very end those that are fetched, so that their weights may take as long as possible.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        resident: bool ``[num_experts, world_size]``, the experts that it need not fetch.
    """
    world_size, num_experts = shares.shape
    lines = np.empty((world_size, num_experts), dtype=np.int64)
    numbers, num_held = np.empty(world_size, dtype=np.int64), np.empty(world_size, dtype=np.int64)
    found, travel = np.empty(num_experts, dtype=np.int64), np.empty((2, num_experts), dtype=np.int64)
    ordered = np.empty((2, num_experts), dtype=np.int64)
    for rank in range(world_size):
        held = fetched = 0
        for i in range(executed_by(rank, shares, found)):
            expert = found[i]
            travels = max(shares[rank, expert] - counts[rank, expert], 0)
            if resident[expert, rank]:
                _insert(ordered[0], travel[0], held, expert, travels)
                held += 1
            else:
                _insert(ordered[1], travel[1], fetched, expert, travels)
                fetched += 1
        # From the fewest that travel on, in turn at the front and at the end; what is fetched, at the end.
        front, back = 0, held - 1
        for i in range(held):
            if i % 2 == 0:
                lines[rank, front] = ordered[0, i]
                front += 1
            else:
                lines[rank, back] = ordered[0, i]
                back -= 1
        for i in range(fetched):
            lines[rank, held + fetched - 1 - i] = ordered[1, i]
        numbers[rank], num_held[rank] = held + fetched, held
    return Lines(lines, numbers, num_held)


@inlined
def _insert(ordered: IntArray, keys: IntArray, number: int, expert: int, key: int) -> None:
    """Put an expert behind those whose key is no larger; both int64, updated, ``number`` of each are ordered."""
    place = number
    while place > 0 and keys[place - 1] > key:
        ordered[place], keys[place] = ordered[place - 1], keys[place - 1]
        place -= 1
    ordered[place], keys[place] = expert, key


@compiled
def divide(
    lines: Lines, counts: IntArray, shares: IntArray, num_stages: int, cut_rows: float, farthest: float
) -> Stages:
    """Cut every rank's line into stages, each with as many of the rows that travel as :func:`weight` says.

    Experts at either end of a line of which nothing travels have a stage of their own, if they are enough for one. A
    cut goes between two experts where one ends nearby, else through one.

    Args:
        lines: the order.
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        num_stages: at least 1.
        cut_rows: how many rows travel in the time that is lost where an expert is cut.
        farthest: how far a cut moves rather than go through an expert, as a share of the smaller stage beside it, if
            that is more.
    """
    world_size, num_experts = shares.shape
    begins, cuts = np.zeros((num_experts, world_size), dtype=np.int64), np.zeros((num_stages + 1, world_size), np.int64)
    for rank in range(world_size):
        line, number = lines.experts[rank], lines.numbers[rank]
        total = rows = staying = 0
        for i in range(number):
            share = shares[rank, line[i]]
            begins[line[i], rank] = rows
            rows += share
            travels = max(share - counts[rank, line[i]], 0)
            total += travels
            staying = staying + share if travels == 0 else 0
        cuts[num_stages, rank] = rows
        # What need not travel at either end has a stage of its own, where it is enough: there nothing is ordered.
        first, last, least = 0, num_stages, rows / (4 * num_stages)
        if last - first > 1 and staying > least:
            last -= 1
            cuts[last, rank] = rows - staying
        before = passed = row = i = 0  # what travels of the experts before the i-th, and their rows
        while i < number and shares[rank, line[i]] <= counts[rank, line[i]]:
            row += shares[rank, line[i]]
            i += 1
        if last - first > 1 and least < row < rows:
            first += 1
            cuts[first, rank] = row
        weights = 0
        for stage in range(first, last):
            weights += weight(stage, num_stages)
        for stage in range(first + 1, last):
            before += weight(stage - 1, num_stages)
            wanted = total * before / weights
            smaller = min(weight(stage - 1, num_stages), weight(stage, num_stages))
            nearby = max(farthest * smaller * total / weights, cut_rows)
            cut = cuts[last, rank]
            while i < number:
                share = shares[rank, line[i]]
                travels = max(share - counts[rank, line[i]], 0)
                if passed + travels <= wanted:
                    passed, row, i = passed + travels, row + share, i + 1
                    continue
                before_it, behind_it = wanted - passed, passed + travels - wanted
                # No stage is left without any, if there are experts enough.
                before_is_one, behind_is_one = row > cuts[stage - 1, rank], row + share < cuts[last, rank]
                if before_is_one and before_it <= nearby and (before_it <= behind_it or not behind_is_one):
                    cut = row
                elif behind_is_one and behind_it <= nearby:
                    cut = row + share
                elif not behind_is_one and min(before_it, behind_it) <= nearby:
                    cut = row
                else:
                    cut = row + int(share * before_it / travels)
                break
            cuts[stage, rank] = min(max(cut, cuts[stage - 1, rank]), cuts[last, rank])
    return Stages(begins, cuts)


@compiled
def group(lines: Lines, shares: IntArray, num_stages: int) -> Stages:
    """Divide every rank's experts into stages, each of about as many assignments as its :func:`weight` says.

    None is cut. The experts with most assignments come first, each to the stage that it makes least full. What is
    fetched is in the last stage.

    Args:
        lines: what every rank executes.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        num_stages: at least 1.
    """
    world_size, num_experts = shares.shape
    begins, cuts = np.zeros((num_experts, world_size), dtype=np.int64), np.zeros((num_stages + 1, world_size), np.int64)
    load, part = np.empty(num_stages), np.empty(num_stages)
    for stage in range(num_stages):
        part[stage] = 1.0 / weight(stage, num_stages)
    ordered, stages = np.empty(num_experts, dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    fewest = np.empty(num_experts, dtype=np.int64)
    for rank in range(world_size):
        load[:] = 0.0
        number, num_held = lines.numbers[rank], lines.num_held[rank]
        for i in range(num_held, number):
            ordered[i], stages[i] = lines.experts[rank, i], num_stages - 1
            load[num_stages - 1] += shares[rank, ordered[i]]
        for i in range(num_held):
            _insert(ordered, fewest, i, lines.experts[rank, i], -shares[rank, lines.experts[rank, i]])
        for i in range(num_held):
            rows, best = shares[rank, ordered[i]], 0
            for stage in range(1, num_stages):
                if (load[stage] + rows) * part[stage] < (load[best] + rows) * part[best]:
                    best = stage
            stages[i] = best
            load[best] += rows
        for stage in range(num_stages):
            cuts[stage + 1, rank] = cuts[stage, rank] + int(load[stage])
            load[stage] = cuts[stage, rank]
        for i in range(number):
            begins[ordered[i], rank] = int(load[stages[i]])
            load[stages[i]] += shares[rank, ordered[i]]
    return Stages(begins, cuts)


@compiled
def cut_for(
    lines: Lines, counts: IntArray, shares: IntArray, num_stages: int, loads: Loads, exchange_s: float, costs: Costs
) -> Stages:
    """Cut lines into stages as fits the machine: where an expert ends unless what is lost by that is more.

    Args:
        lines: the order.
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        num_stages: at least 1.
        loads: what the ranks do.
        exchange_s: what the exchange takes one way, in seconds.
        costs: the machine's.
    """
    farthest = _FARTHEST if 2 * exchange_s < slowest_work_s(loads, costs) else 0.0
    cut_rows = lost_by_cut_s(loads, costs) / max(costs.exchange_token_s, 1e-12)
    return divide(lines, counts, shares, num_stages, cut_rows, farthest)
