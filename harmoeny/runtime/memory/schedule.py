"""Orders a rank's work in one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from harmoeny.choices import WorkOrder
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
            device_SE, home, cost, work_order=work_order, grouped=grouped, arrivals=arrivals, head_s=head_s,
            rest_s=rest_s, wanted=wanted,
        )  # fmt: skip
        return _beside_host(device, executed_SE[0], host_E, grouped=grouped)
    stages, experts = np.nonzero(executed_SE)
    num_tokens = executed_SE[stages, experts]
    content = np.asarray(home)
    slot_of = np.full(executed_SE.shape[1], NONE)
    held = np.flatnonzero(content != EMPTY)
    slot_of[content[held]] = held
    slots = slot_of[experts]
    if slots.size and slots.min() == NONE:
        order = np.lexsort((experts, -num_tokens, stages))
        columns = (stages, experts, num_tokens, np.cumsum(num_tokens) - num_tokens)
        parts = list(map(Slice, *(column[order].tolist() for column in columns)))
        draft = draft_waves if grouped else draft_schedule
        times = Predicted(cost, arrivals or {}, head_s, rest_s)
        return draft(parts, home, times, work_order=work_order, wanted=wanted)
    starts = np.cumsum(num_tokens) - num_tokens
    order = np.lexsort((slots, stages)) if grouped else np.lexsort((-num_tokens, stages))
    num_tokens, count = num_tokens[order], len(order)
    ends = np.flatnonzero(np.diff(stages, append=NONE)) + 1 if grouped else np.arange(1, count + 1)
    starts = np.cumsum(num_tokens) - num_tokens if grouped else starts[order]
    restores, after = ((), None) if wanted is None else closing(home, home, wanted)
    return Schedule(
        stages.tolist(), experts[order].tolist(), slots[order].tolist(), starts.tolist(), num_tokens.tolist(),
        ends.tolist(), restores=restores, after=after,
    )  # fmt: skip


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
