"""Orders a rank's work in one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray
from harmoeny.runtime.memory.draft import NONE, Predicted, Slice, closing, draft_schedule
from harmoeny.runtime.memory.draft_waves import draft_waves
from harmoeny.runtime.memory.residents import EMPTY
from harmoeny.runtime.memory.waves import HostSlice, Schedule


def make_schedule(
    executed_SE: IntArray,
    home: Sequence[int],
    cost: ExpertCost,
    *,
    work_order: str = WorkOrder.COVERED,
    grouped: bool = False,
    arrivals: Mapping[int, float] | None = None,
    halved: Set[int] = frozenset(),
    head_s: float = 0.0,
    rest_s: float = 0.0,
    host_E: BoolArray | None = None,
    wanted: Set[int] | None = None,
) -> Schedule:
    """Order a rank's slices so that fetches hide behind computation.

    Fetches run at most two experts ahead, each into a slot that is free by then: the slot of the expert executed two
    slices before, as in the paper (arXiv 2506.12417, section 4.2), or, where that gives an earlier start, a slot whose
    resident has no tokens in this batch. Grouped, as many as there are such slots. ``paper`` executes the two residents
    with the most tokens first, then the fetched experts, then the other residents. ``covered`` executes residents until
    the next fetched expert is predicted to be there, so that small residents are no reason to stall. Residents, and
    fetched experts too, come by stage, and within a stage those with the most tokens first.

    Rows lie by stage. Within a stage they are ordered by expert and every slice is a wave of its own; a grouped
    schedule orders them by wave and slot, and its waves are as large as they can be without waiting for weights, or
    holding up a fetch that waits for a slot, for longer than a launch takes.

    What the host executes needs no slot. Its rows lie where their expert puts them; grouped, behind those of all waves.

    Args:
        executed_SE: int64 ``[num_stages, num_experts]``, rows per expert that arrive at each stage of an exchange.
        home: expert in every slot before and after the layer, ``EMPTY`` where there is none; at least one slot.
        cost: predicts when fetches and slices end.
        work_order: ``covered`` or ``paper``.
        grouped: execute many slices at once.
        arrivals: when weights from peers are predicted to be there, by expert, in seconds after fetches can begin; all
            others come from the host, one after the other.
        halved: those of these experts of which the second half comes from the host, in its turn.
        head_s: how much sooner fetches can begin than slices: what the dispatch takes.
        rest_s: how much later the rows of stages behind the first are there than its own.
        host_E: bool ``[num_experts]``, what the host executes, of the only stage; None: nothing.
        wanted: the residents after the layer; None: those before it.

    Returns:
        The schedule; every slice is executed once, and a fetch never overwrites a slot that an earlier wave needs.
    """
    if host_E is not None and host_E.any():
        device_SE = np.where(host_E, 0, executed_SE)
        device = make_schedule(
            device_SE, home, cost, work_order=work_order, grouped=grouped, arrivals=arrivals, halved=halved,
            head_s=head_s, rest_s=rest_s, wanted=wanted,
        )  # fmt: skip
        return _beside_host(device, executed_SE[0], host_E, grouped=grouped)
    content = np.asarray(home)
    order, ends, all_held = _by_residents(executed_SE, content, grouped)
    if not all_held:
        stages, experts = np.nonzero(executed_SE)
        num_tokens = executed_SE[stages, experts]
        priority = np.lexsort((experts, -num_tokens, stages))
        columns = (stages, experts, num_tokens, np.cumsum(num_tokens) - num_tokens)
        parts = list(map(Slice, *(column[priority].tolist() for column in columns)))
        draft = draft_waves if grouped else draft_schedule
        times = Predicted(cost, arrivals or {}, halved, head_s, rest_s)
        return draft(parts, home, times, work_order=work_order, wanted=wanted)
    restores, after = ((), None) if wanted is None else closing(home, home, wanted)
    stage, expert_ids, slots, starts, num_tokens = order.tolist()
    return Schedule(stage, expert_ids, slots, starts, num_tokens, ends.tolist(), restores=restores, after=after)


@compiled
def _by_residents(executed_SE: IntArray, home: IntArray, grouped: bool) -> tuple[IntArray, IntArray, bool]:
    """Order slices of residents, by stage and slot or, where they are not grouped, from the most rows on.

    Returns:
        int64 ``[5, slices]``, of every slice its stage, expert, slot, first row and rows; int64 ``[waves]``, one behind
        the last slice of every wave; and whether all experts are residents, without which the others mean nothing.
    """
    num_stages, num_experts = executed_SE.shape
    slot_of = np.full(num_experts, NONE)
    for slot, expert in enumerate(home):
        if expert != EMPTY:
            slot_of[expert] = slot
    stages, experts, slots, starts, rows = order = np.empty((5, executed_SE.size), np.int64)
    ends = np.empty(executed_SE.size, np.int64)
    start_E = np.empty(num_experts, np.int64)
    count, num_waves, row = 0, 0, 0
    for stage in range(num_stages):
        first = count
        for expert in range(num_experts):
            num_tokens = executed_SE[stage, expert]
            start_E[expert] = row
            row += num_tokens
            if num_tokens == 0:
                continue
            if slot_of[expert] == NONE:
                return order[:, :0], ends[:0], False
            place = count
            while not grouped and place > first and executed_SE[stage, experts[place - 1]] < num_tokens:
                experts[place] = experts[place - 1]
                place -= 1
            experts[place] = expert
            count += 1
        if grouped:
            place, start = first, start_E[0]
            for expert in home:
                if expert != EMPTY and executed_SE[stage, expert] > 0:
                    experts[place], start_E[expert] = expert, start
                    start += executed_SE[stage, expert]
                    place += 1
        for place in range(first, count):
            expert = experts[place]
            stages[place], slots[place] = stage, slot_of[expert]
            starts[place], rows[place] = start_E[expert], executed_SE[stage, expert]
            if not grouped or place == count - 1:
                ends[num_waves] = place + 1
                num_waves += 1
    return order[:, :count], ends[:num_waves], True


def _beside_host(device: Schedule, executed_E: IntArray, host_E: BoolArray, *, grouped: bool) -> Schedule:
    """Add what the host executes, with the most tokens first, to the schedule of the other experts.

    Args:
        device: their schedule, whose rows lie as if there were no others.
        executed_E: int64 ``[num_experts]``, rows of all experts.
        host_E: bool ``[num_experts]``, what the host executes.
        grouped: whether the device's rows come first.
    """
    rows_E = np.where(host_E, executed_E, 0) if grouped else executed_E
    starts_E = np.cumsum(rows_E) - rows_E + (sum(device.num_tokens) if grouped else 0)
    starts = device.starts if grouped else starts_E[list(device.expert_ids)].tolist()
    experts = np.flatnonzero(host_E & (executed_E > 0))
    experts = experts[np.argsort(-executed_E[experts], kind="stable")]
    host = map(HostSlice, experts.tolist(), starts_E[experts].tolist(), executed_E[experts].tolist())
    return replace(device, starts=starts, host=list(host))
