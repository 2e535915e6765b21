"""Divides what ranks execute into stages, so that the exchange of one is behind the products of another.

Source: EPS-MoE, arXiv 2410.12247: groups of experts, and how many of them pay. Which experts are together, and what a
layer then takes, is decided here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harmoeny.compiled import compiled, inlined
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import Plan
from harmoeny.predict import SLICES, Costs, FloatArray, Loads, Sources, add_slice, rest_s, work_s

#: The most stages of a plan that chooses their number.
MOST_STAGES = 16
#: What more stages have to gain, as a share of the time of fewer.
_LEAST_GAIN = 0.005
#: How much larger than the outermost stages the largest are, and how many stages from the ends.
_LARGEST, _GROWING = 4, 2


def in_stages(plan: Plan, num_stages: int | None) -> Plan:
    """Return a plan in so many stages of experts; one that has stages already, or lets hosts execute, stays as it is.

    Args:
        plan: of any policy.
        num_stages: at least 1; None: what the policy decided.
    """
    has_host = plan.host is not None and bool(plan.host.any())
    if num_stages in (None, 1) or plan.source_groups is not None or plan.expert_stages is not None or has_host:
        return plan
    shares = np.ascontiguousarray(plan.executed().T)
    return replace(plan, expert_stages=divide(shares, ~plan.fetch, num_stages))


@compiled
def no_stages() -> IntArray:
    """Return the stages where everything is exchanged at once: of no size."""
    return np.empty((0, 0), dtype=np.int64)


@inlined
def weight(stage: int, num_stages: int) -> int:
    """Return how large a stage is meant to be: a quarter, half or all of the largest ones.

    Nothing is hidden behind the first rows on their way, nor behind the last results, so these are few. Each stage in
    between has the products of a smaller one to hide behind, which take at least as long as its rows where they decide.
    """
    nearest = min(stage, num_stages - 1 - stage)
    return _LARGEST if nearest >= _GROWING else 2**nearest


@compiled
def divide(shares: IntArray, resident: BoolArray, num_stages: int) -> IntArray:
    """Divide what every rank executes into stages, each of about as many assignments as its :func:`weight` says.

    The experts with most assignments come first, each to the stage that it makes least full. What is fetched is in the
    last stage, so that its weights may take as long as possible.

    Args:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``, the experts that it need not fetch.
        num_stages: at least 1.

    Returns:
        int64 ``[num_experts, world_size]``, from 0 on; 0 for what a rank does not execute.
    """
    world_size, num_experts = shares.shape
    stages, last = np.zeros((num_experts, world_size), dtype=np.int64), num_stages - 1
    load, part = np.empty(num_stages), np.empty(num_stages)
    for stage in range(num_stages):
        part[stage] = 1.0 / weight(stage, num_stages)
    experts = np.empty(num_experts, dtype=np.int64)
    for rank in range(world_size):
        load[:] = 0.0
        number = 0
        for expert in range(num_experts):
            rows = shares[rank, expert]
            if rows == 0:
                continue
            if not resident[expert, rank]:
                stages[expert, rank] = last
                load[last] += rows
                continue
            place = number
            while place > 0 and shares[rank, experts[place - 1]] < rows:
                experts[place] = experts[place - 1]
                place -= 1
            experts[place] = expert
            number += 1
        for i in range(number):
            rows = shares[rank, experts[i]]
            best = 0
            for stage in range(1, num_stages):
                if (load[stage] + rows) * part[stage] < (load[best] + rows) * part[best]:
                    best = stage
            stages[experts[i], rank] = best
            load[best] += rows
    return stages


@compiled
def best_stages(loads: Loads, exchange_s: float, costs: Costs) -> tuple[int, float]:
    """Return how many stages are enough, and how many seconds these gain at best.

    With ``X`` what an exchange takes beside its latency ``l``, ``C`` the products of the slowest rank, ``s`` their
    launch, and ``f`` the first and the last stage's part of its rows, N stages take at least
    ``C + (N - 1) s + 2 (l + f X)``, where the first rows and the last results wait for products, and at least
    ``2 (N l + X)``, where the link is never idle. Enough are the fewest that no other
    number is better than by more than 0.5 %. Where the latency of an exchange is not known, there is one stage.

    Args:
        loads: what the ranks do.
        exchange_s: what the exchange takes one way.
        costs: the machine's.
    """
    latency_s, rows_s = costs.exchange_latency_s, exchange_s - costs.exchange_latency_s
    computed_s, most = 0.0, 1
    for rank in range(len(loads.sent)):
        computed_s = max(computed_s, work_s(loads.work, rank, costs))
        most = max(most, int(loads.work[SLICES, rank]))
    plain_s = computed_s + 2 * exchange_s
    best, best_s = 1, plain_s
    if latency_s > 0:
        for number in range(2, min(most, MOST_STAGES) + 1):
            weights = 0
            for stage in range(number):
                weights += weight(stage, number)
            part = 1.0 / min(weights, most)
            launches_s = (number - 1) * costs.launch_s if costs.grouped > 0 else 0.0
            waiting_s = computed_s + launches_s + 2 * (latency_s + part * rows_s)
            stages_s = max(waiting_s, 2 * (number * latency_s + rows_s))
            if stages_s < (1 - _LEAST_GAIN) * best_s:
                best, best_s = number, stages_s
    return best, plain_s - best_s


@compiled
def staged_s(
    counts: IntArray,
    shares: IntArray,
    stages: IntArray,
    num_stages: int,
    loads: Loads,
    sources: Sources,
    exchange_s: float,
    costs: Costs,
) -> float:
    """Return how long a layer in stages takes from the plan to the end of the combine, in seconds.

    One exchange follows the other. A rank computes a stage when its rows are there and were ordered, and the one before
    is done. Results of a stage go back when all ranks have them, behind all rows. Fetched experts are computed at the
    end of the last stage.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        stages: int64 ``[num_experts, world_size]``, when.
        num_stages: how many there are.
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what one exchange of everything would take one way.
        costs: the machine's.
    """
    world_size = len(counts)
    executed, work = _stage_work(shares, stages, num_stages, costs)
    rows = _stage_rows(counts, shares, stages, num_stages)
    # All that an exchange takes beside its latency goes by the rows of the busiest rank.
    row_s = (exchange_s - costs.exchange_latency_s) / max(loads.sent.max(), loads.received.max(), 1)
    gather_s = loads.routed.max() * costs.copy_token_s
    wire_s, arrived_s = np.empty(num_stages), np.empty(num_stages)
    now_s = gather_s
    for stage in range(num_stages):
        wire_s[stage] = costs.exchange_latency_s + rows[stage] * row_s
        now_s += wire_s[stage]
        arrived_s[stage] = now_s
    end_s = np.zeros(num_stages)
    for rank in range(world_size):
        rank_s = 0.0
        for stage in range(num_stages):
            rank_s = max(rank_s, arrived_s[stage]) + 2 * executed[stage, rank] * costs.copy_token_s
            if stage == num_stages - 1 and sources.fetched[SLICES, rank] > 0:
                rank_s = _with_fetched_s(rank_s, work[stage], sources, rank, costs)
            else:
                rank_s += work_s(work[stage], rank, costs)
            end_s[stage] = max(end_s[stage], rank_s)
    for stage in range(num_stages):
        now_s = max(now_s, end_s[stage]) + wire_s[stage]
    return float(max(now_s + 2 * gather_s, sources.host_link_s.max()))


@compiled
def _stage_work(shares: IntArray, stages: IntArray, num_stages: int, costs: Costs) -> tuple[IntArray, FloatArray]:
    """Return int64 ``[num_stages, world_size]`` assignments, and float64 ``[num_stages, 3, world_size]`` their work."""
    world_size, num_experts = shares.shape
    executed, work = np.zeros((num_stages, world_size), dtype=np.int64), np.zeros((num_stages, 3, world_size))
    for rank in range(world_size):
        for expert in range(num_experts):
            share = shares[rank, expert]
            if share > 0:
                stage = stages[expert, rank]
                executed[stage, rank] += share
                add_slice(work[stage], rank, share, 1, costs)
    return executed, work


@inlined
def _with_fetched_s(begin_s: float, work: FloatArray, sources: Sources, rank: int, costs: Costs) -> float:
    """Return when a rank has computed a stage that has all of its fetched experts; ``work`` is the stage's."""
    ready_s = sources.ready_s[rank]
    turns_s = (sources.turns[rank] - 1) * costs.launch_s if costs.grouped > 0 else 0.0
    held_s = rest_s(work, sources.fetched, rank, costs)
    apart_s = max(begin_s + held_s, ready_s) + work_s(sources.fetched, rank, costs) + turns_s
    if costs.grouped > 0 and sources.joins[rank]:
        apart_s = min(apart_s, max(begin_s, ready_s) + work_s(work, rank, costs))
    return float(apart_s)


@compiled
def _stage_rows(counts: IntArray, shares: IntArray, stages: IntArray, num_stages: int) -> FloatArray:
    """Return float64 ``[num_stages]``, the most rows that a rank sends or receives at every stage.

    What is sent is exact where all ranks that get rows of an expert execute it at one stage; else it is in proportion.
    """
    world_size, num_experts = counts.shape
    sent, received = np.zeros((num_stages, world_size)), np.zeros((num_stages, world_size))
    arriving, only = np.zeros((num_experts, num_stages)), np.full(num_experts, -1, dtype=np.int64)
    total = np.zeros(num_experts)
    for rank in range(world_size):
        for expert in range(num_experts):
            more = shares[rank, expert] - counts[rank, expert]
            if more > 0:
                stage = stages[expert, rank]
                received[stage, rank] += more
                arriving[expert, stage] += more
                total[expert] += more
                only[expert] = stage
    for rank in range(world_size):
        for expert in range(num_experts):
            less = counts[rank, expert] - shares[rank, expert]
            if less <= 0:
                continue
            if arriving[expert, only[expert]] == total[expert]:
                sent[only[expert], rank] += less
            else:
                for stage in range(num_stages):
                    sent[stage, rank] += less * arriving[expert, stage] / total[expert]
    rows = np.zeros(num_stages)
    for stage in range(num_stages):
        for rank in range(world_size):
            rows[stage] = max(rows[stage], sent[stage, rank], received[stage, rank])
    return rows
