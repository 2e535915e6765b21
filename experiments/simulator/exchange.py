"""What dispatch and combine take: rows are picked, sent, grouped by expert, and on the way back the same reversed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from experiments.routers.base import FloatArray
from experiments.simulator.cost import CostModel
from experiments.simulator.flows import Flows
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray, Placement


@dataclass(frozen=True)
class ExchangeTimes:
    """Times of one direction; all arrays are float64 ``[world_size]``.

    Attributes:
        rows: rows that a rank prepares, for itself too.
        gather_s: picking them out of the tokens.
        wire_s: the all-to-all.
        group_s: ordering received rows by expert, and the results back.
        add_s: putting results in their places and weighting them.
    """

    rows: FloatArray
    gather_s: FloatArray
    wire_s: FloatArray
    group_s: FloatArray
    add_s: FloatArray

    def at(self, pace: FloatArray) -> ExchangeTimes:
        """Return the same for ranks that take so many times as long (float64 ``[world_size]``) for their own part."""
        return replace(
            self, gather_s=self.gather_s * pace, group_s=self.group_s * pace, add_s=self.add_s * pace
        )  # fmt: skip


@dataclass(frozen=True)
class Arrivals:
    """When a layer's rows are there, stage by stage, and how their results get back.

    Attributes:
        arrived_s: float64 ``[num_stages, world_size]``, when rows are where they are executed.
        ordering_s: float64 ``[num_stages, world_size]``, what it takes to order them and their results, beside what
            the first of those has in it.
        parts: the exchanges, of which each follows the one before; of no number where all rows travel at once.
        traffic: float64 ``[num_parts, world_size, world_size]``, what goes from rank to rank in each.
    """

    arrived_s: FloatArray
    ordering_s: FloatArray
    parts: Sequence[ExchangeTimes]
    traffic: FloatArray

    @classmethod
    def of(cls, cost: CostModel, flows: Flows, exchange: ExchangeTimes, ready_s: FloatArray, pace: FloatArray) -> Self:
        """Return when rows arrive that are sent from ``ready_s`` on (float64 ``[world_size]``, as all arrays).

        Args:
            cost: the cost model.
            flows: what is exchanged.
            exchange: what it takes if all of it is exchanged at once.
            ready_s: when every rank can send.
            pace: how many times as long its own part takes as the cost model says.
        """
        all_ready_s, none = ready_s.max(), np.zeros_like(ready_s)
        if flows.stage_traffic is not None:
            parts = [
                _stage_exchange(cost, *part).at(pace) for part in zip(flows.stage_traffic, flows.stages, strict=True)
            ]
            arrived_s = stage_arrivals_s(parts, exchange, ready_s)
            return cls(arrived_s, np.stack([2 * part.group_s for part in parts]), parts, flows.stage_traffic)
        arrived_s = all_ready_s + exchange.wire_s + exchange.group_s
        first_s = arrived_s if flows.slices is None else ready_s
        stages_s = np.stack([first_s, *[arrived_s] * (len(flows.stages) - 1)])
        return cls(stages_s, np.broadcast_to(none, stages_s.shape), [], flows.traffic[:0])

    def added_s(self, stage_end_s: FloatArray, exchange: ExchangeTimes) -> FloatArray:
        """Return when the results of exchanges that follow each other are back and added up; float64 ``[world_size]``.

        Those of the last exchange are added to the sum of all others, which is made while they are on their way.

        Args:
            stage_end_s: float64 ``[num_stages, world_size]``, when every rank has executed a stage.
            exchange: what it takes if all is exchanged at once.
        """
        free_s: FloatArray = self.arrived_s[-1]  # rows of all stages were queued first
        travelling = [stage for stage, part in enumerate(self.parts) if part.wire_s.any()]
        last = travelling[-1] if len(travelling) > 1 else None
        before_s = stage_end_s[-1]
        for stage, (end_s, part, traffic) in enumerate(zip(stage_end_s, self.parts, self.traffic, strict=True)):
            if stage == last:
                before_s = np.maximum(before_s, free_s)
            free_s = np.maximum(last_partner(end_s, traffic), free_s) + part.wire_s
        last_s = exchange.add_s if last is None else self.parts[last].add_s
        again_s = 0.0 if last is None else last_s / 2  # what is added to is read and written once more
        added_s: FloatArray = np.maximum(before_s + exchange.add_s - last_s, free_s) + last_s + again_s
        return added_s


def stage_arrivals_s(parts: Sequence[ExchangeTimes], exchange: ExchangeTimes, ready_s: FloatArray) -> FloatArray:
    """Return float64 ``[num_stages, world_size]``, when the rows of stages that are exchanged in turn can be executed.

    The first rows that travel are on their way while the rest is gathered, before anything is executed.

    Args:
        parts: the exchange of every stage.
        exchange: that of all rows.
        ready_s: float64 ``[world_size]``, when every rank has gathered all.
    """
    first = next((i for i, part in enumerate(parts) if part.wire_s.any()), 0)
    rest_s = exchange.gather_s - np.sum([part.gather_s for part in parts[: first + 1]], axis=0)
    arrived_s, now_s = np.empty((len(parts), len(ready_s))), np.full_like(ready_s, (ready_s - rest_s).max())
    for stage, part in enumerate(parts):
        if stage == first + 1:
            now_s = np.maximum(now_s, ready_s.max())
        now_s = now_s + part.wire_s
        arrived_s[stage] = np.maximum(now_s, ready_s)
    return arrived_s


@compiled
def last_partner(ready_s: FloatArray, traffic: FloatArray) -> FloatArray:
    """Return, for every rank, when the last of those that it exchanges rows with is ready, itself included.

    Args:
        ready_s: float64 ``[world_size]``.
        traffic: float64 ``[world_size(src), world_size(dst)]``, assignments.
    """
    last = ready_s.copy()
    for src in range(len(ready_s)):
        for dst in range(len(ready_s)):
            if traffic[src, dst] > 0:
                last[src] = max(last[src], ready_s[dst])
                last[dst] = max(last[dst], ready_s[src])
    return last


def plain_exchange(cost: CostModel, traffic: FloatArray, executed: IntArray) -> ExchangeTimes:
    """Return the times of our dispatch: one all-to-all of exactly the assignments.

    Args:
        cost: the cost model.
        traffic: float64 ``[world_size(src), world_size(dst)]``, assignments.
        executed: int64 ``[num_experts, world_size]``, the same by expert and the rank that executes them.
    """
    sent, received = traffic.sum(axis=1), traffic.sum(axis=0)
    # Rows arrive by source and expert.
    in_order = cost.puts | ((traffic > 0).sum(axis=0) <= 1) | ((executed > 0).sum(axis=0) <= 1)
    return ExchangeTimes(
        rows=sent,
        gather_s=cost.copy_s(sent),
        wire_s=cost.exchange_s(traffic),
        group_s=np.where(in_order, 0.0, cost.copy_s(received)),
        add_s=2 * cost.copy_s(sent),
    )


def _stage_exchange(cost: CostModel, traffic: FloatArray, executed: IntArray) -> ExchangeTimes:
    """Return the times of one stage's exchange, in which ranks that neither send nor receive take no part."""
    times, others = plain_exchange(cost, traffic, executed), traffic - np.diag(traffic.diagonal())
    return replace(times, wire_s=np.where(others.any(axis=0) | others.any(axis=1), times.wire_s, 0.0))


def padded_exchange(cost: CostModel, num_tokens: int, capacity: int, placement: Placement) -> ExchangeTimes:
    """Return the times of a padding system: every rank sends ``capacity`` rows for every expert to its home rank.

    Tokens are copied to their places, or brought there by a product where the software does so
    (:attr:`SoftwareCost.padded`).

    Args:
        cost: the cost model.
        num_tokens: tokens of a rank.
        capacity: rows per expert and rank.
        placement: the homes.
    """
    world_size = placement.world_size
    residents = np.bincount(placement.home, minlength=world_size)
    traffic = np.tile(residents * float(capacity), (world_size, 1))
    rows = traffic.sum(axis=1)
    if cost.software.padded:
        spread_s = np.full(world_size, cost.gather_by_product_s(num_tokens, capacity))
    else:
        spread_s = cost.copy_s(rows)
    return ExchangeTimes(
        rows=rows,
        gather_s=spread_s,
        wire_s=cost.exchange_s(traffic),
        group_s=np.zeros(world_size),
        add_s=spread_s,
    )
