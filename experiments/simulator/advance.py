"""Advances all ranks of one system through a batch, phase by phase, with the times of the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.routers.base import FloatArray
from experiments.simulator.compute import RankMemories
from experiments.simulator.cost import CostModel
from experiments.simulator.device_memory import check_memory, layer_bytes, mask_bytes
from experiments.simulator.early import Early
from experiments.simulator.exchange import Arrivals, ExchangeTimes, last_partner, padded_exchange, plain_exchange
from experiments.simulator.flows import Flows, capped, plan_flows
from experiments.simulator.jitter import Jitter
from experiments.simulator.model_work import ModelWork
from experiments.simulator.plan_size import plan_size
from experiments.simulator.plan_times import PlanTimes
from experiments.simulator.planning import PlanTimer
from experiments.simulator.routing import with_shared_counts
from experiments.simulator.sharing import sharing_pace
from harmoeny.modelled import PadsBuffers
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.runtime.layer.recorder import PHASES, Phase
from harmoeny.runtime.layer.residency import Residency


@dataclass
class SimulatedLayer:
    """One layer of one batch; all arrays are ``[world_size]``.

    Attributes:
        layer: MoE layer in order of execution.
        boundary_s: float64 ``[7, world_size]``, start of every phase and the end of the last.
        columns: the other columns of the record.
    """

    layer: int
    boundary_s: FloatArray
    columns: dict[str, IntArray | FloatArray]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``layers.parquet``, with ``compute_end_s`` in place of ``idle_s``."""
        values = {name: column.tolist() for name, column in self.columns.items()}
        lengths = np.diff(self.boundary_s, axis=0)
        values |= {f"{phase.name.lower()}_s": lengths[phase].tolist() for phase in PHASES}
        values["layer_s"] = (self.boundary_s[-1] - self.boundary_s[0]).tolist()
        values["compute_end_s"] = self.boundary_s[-2].tolist()
        world_size = self.boundary_s.shape[1]
        return [
            {"layer": self.layer, "rank": rank} | {name: column[rank] for name, column in values.items()}
            for rank in range(world_size)
        ]


@dataclass(frozen=True)
class SimulatedBatch:
    """One forward pass.

    Attributes:
        end_s: float64 ``[world_size]``, when a rank has its first output token, from the common start.
        drain_s: float64 ``[world_size]``, how much later its last restore is complete.
        layers: the MoE layers.
    """

    end_s: FloatArray
    drain_s: FloatArray
    layers: list[SimulatedLayer]


class SimulatedSystem:
    """One system on all its ranks: what ``ExpertParallel`` does on each of them, here done for all at once.

    Attributes:
        policy: makes the plans.
        cost: the cost model, for batches of the present size.
        held_bytes: float64 ``[world_size]``, device memory that is taken all the time.
    """

    def __init__(
        self,
        policy: Policy,
        cost: CostModel,
        device_memory_bytes: float | None = None,
        plan_times: PlanTimes | None = None,
        jitter: Jitter | None = None,
    ) -> None:
        """Place the experts.

        Args:
            policy: calibrated and fitted.
            cost: the cost model.
            device_memory_bytes: of every rank; None: no limit.
            plan_times: what is known of how long the policy plans, and what becomes known; None: nothing is kept.
            jitter: how much ranks differ; None: not at all.

        Raises:
            OutOfMemoryError: the residents do not fit.
        """
        self.policy, self.cost = policy, cost
        work, world_size = cost.work, cost.topology.world_size
        self._limit = device_memory_bytes
        placements = [
            policy.place(i, work.num_experts, world_size).with_shared(work.num_shared)
            for i in range(len(work.layer_tokens))
        ]
        self._memories = RankMemories(policy, placements, cost)
        self._residency = Residency(policy, placements)
        self._plan_timer = PlanTimer(policy)
        self._plan_times = plan_times or PlanTimes()
        self._jitter = jitter
        #: By the work's id, which no other has as long as the cost model refers to it.
        self._costs = {id(work): cost}
        self.held_bytes: FloatArray = work.dense_bytes + self._memories.num_slots.astype(np.float64) * work.expert_bytes
        check_memory(self.held_bytes + work.peak_bytes, device_memory_bytes, "the dense part of the model")

    def run(self, counts: Sequence[IntArray]) -> SimulatedBatch:
        """Execute one batch that begins at 0 on all ranks, and the copies that it leaves behind.

        Args:
            counts: int64 ``[world_size, num_experts]`` per MoE layer.

        Raises:
            OutOfMemoryError: a layer needs more memory than a rank has.
        """
        end_s, layers = self.forward(counts, np.zeros(self.cost.topology.world_size))
        return SimulatedBatch(end_s, np.maximum(self.finish() - end_s, 0.0), layers)

    def forward(self, counts: Sequence[IntArray], start_s: FloatArray) -> tuple[FloatArray, list[SimulatedLayer]]:
        """Execute one batch after those since the last :meth:`finish`, whose copies may still be under way.

        Args:
            counts: int64 ``[world_size, num_experts]`` per MoE layer, without shared experts.
            start_s: float64 ``[world_size]``, when every rank begins.

        Returns:
            float64 ``[world_size]``, when a rank has its first output token, and the layers.

        Raises:
            OutOfMemoryError: a layer needs more memory than a rank has.
        """
        now_s = start_s
        layers = []
        for layer, layer_counts in enumerate(counts):
            pace = self._pace()
            begin_s = now_s + self.cost.dense_s[layer] * pace
            layers.append(self._layer(layer, with_shared_counts(layer_counts, self.cost.work), begin_s, pace))
            now_s = layers[-1].boundary_s[-1]
        return now_s + self.cost.dense_s[-1] * self._pace(), layers

    def finish(self) -> FloatArray:
        """Complete all copies; the next batch may begin at 0 again.

        Returns:
            float64 ``[world_size]``, when a rank's last copy ended.
        """
        return self._memories.end_batch()

    def resize(self, work: ModelWork) -> None:
        """Execute batches of another size from now on."""
        if id(work) not in self._costs:
            self._costs[id(work)] = self.cost.of(work)
        self.cost = self._costs[id(work)]

    def begin_round(self, loop: str, index: int) -> None:
        """Begin a loop's round: what follows takes as long as that round has it."""
        if self._jitter is not None:
            self._jitter.begin_round(loop, index)

    def _pace(self) -> FloatArray:
        """Return float64 ``[world_size]``, how many times as long ranks take for a layer as the cost model says."""
        return np.ones(self.cost.topology.world_size) if self._jitter is None else self._jitter.pace()

    def _computing_pace(self, stages: IntArray, pace: FloatArray) -> FloatArray:
        """Return ``pace`` (float64 ``[world_size]``) of ranks that may compute on the same device.

        Args:
            stages: int64 ``[num_stages, num_experts, world_size]``, the rows that they execute.
            pace: how many times as long a rank takes as the cost model says.
        """
        if not self.cost.device_sharing:
            return pace
        return pace * sharing_pace(self.cost.experts_s(stages) * pace, self.cost.device_sharing)

    def _layer(self, layer: int, counts: IntArray, start_s: FloatArray, pace: FloatArray) -> SimulatedLayer:
        cost = self.cost
        boundary_s = np.empty((len(PHASES) + 1, len(start_s)))
        boundary_s[Phase.ROUTE] = start_s
        boundary_s[Phase.METADATA] = start_s + cost.route_s[layer] * pace
        # Nobody knows the counts before the last rank has sent its own.
        boundary_s[Phase.PLAN] = boundary_s[Phase.METADATA].max() + cost.metadata_s
        early = Early.of(
            self.policy,
            counts,
            self._residency.placements[layer],
            cost,
            lambda stages: self._computing_pace(stages, pace),
        )
        early_end_s, rest = boundary_s[Phase.METADATA] + early.seconds, counts - early.executed.T
        placed_s = self._place_anew(layer, counts, boundary_s[Phase.PLAN], early_end_s)
        flows, exchange, plan_s = self._plan(layer, rest)
        exchange, placement = exchange.at(pace), self._residency.placements[layer]
        planned_s = np.maximum(placed_s + (early.choice_s + plan_s) * pace, early_end_s)
        boundary_s[Phase.DISPATCH] = self._look_ahead(layer, counts, planned_s)
        ready_s = boundary_s[Phase.DISPATCH] + exchange.gather_s
        arrivals = Arrivals.of(cost, flows, exchange, ready_s, pace)
        boundary_s[Phase.COMPUTE] = ready_s if flows.slices is not None else arrivals.arrived_s[0]
        done = self._memories.run(
            layer,
            flows,
            placement,
            self._residency.retain(layer),
            planned_s=boundary_s[Phase.DISPATCH],
            start_s=boundary_s[Phase.COMPUTE],
            arrivals=arrivals,
            pace=self._computing_pace(flows.stages, pace),
        )
        boundary_s[Phase.COMBINE] = done.end_s
        if arrivals.parts:
            added_s = arrivals.added_s(done.stage_end_s, exchange)
        else:
            returned_s = last_partner(done.end_s + exchange.group_s, flows.traffic) + exchange.wire_s
            added_s = returned_s + exchange.add_s
        boundary_s[Phase.END] = added_s + early.add_s * pace + done.restoring_s
        executed = flows.executed + early.executed
        columns: dict[str, IntArray | FloatArray] = {
            "num_assignments": counts.sum(axis=1),
            "executed_tokens": executed.sum(axis=0),
            "sent_tokens": _whole(flows.traffic.sum(axis=1) - flows.traffic.diagonal()),
            "dropped_tokens": _whole(rest.sum(axis=1) - flows.traffic.sum(axis=1)),
            "padded_tokens": flows.rows.sum(axis=0) - flows.executed.sum(axis=0),
            "num_active_experts": (executed > 0).sum(axis=0),
            "predicted_s": np.full(len(start_s), flows.predicted_s or 0.0),
        }
        return SimulatedLayer(layer, boundary_s, columns | done.columns)

    def _place_anew(self, layer: int, counts: IntArray, now_s: FloatArray, early_end_s: FloatArray) -> FloatArray:
        """Let the policy change the residents; return when every rank can plan.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``.
            now_s: float64 ``[world_size]``, when the counts are known.
            early_end_s: likewise, when nobody reads the slots any more.
        """
        changed = self._residency.update(layer, counts)
        if changed is None:
            return now_s
        return self._memories.replace_residents(layer, changed, np.maximum(now_s, early_end_s))

    def _look_ahead(self, layer: int, counts: IntArray, now_s: FloatArray) -> FloatArray:
        """Let the policy change the residents of the next layer; return when every rank can go on."""
        changed = self._residency.look_ahead(layer, counts)
        return now_s if changed is None else self._memories.replace_residents(layer + 1, changed, now_s, ahead=True)

    def _plan(self, layer: int, counts: IntArray) -> tuple[Flows, ExchangeTimes, float]:
        """Return the plan's flows, what they cost to exchange, and how long planning took."""
        cost, placement = self.cost, self._residency.placements[layer]
        flows = plan_flows(self.policy, counts, placement)
        policy_s = None
        if cost.software.plan_s is None:
            policy_s = self._plan_times.seconds(
                counts, placement, lambda: self._plan_timer.seconds(layer, counts, placement)
            )
        num_tokens = cost.work.layer_tokens[layer]
        capacity = None
        if cost.software.padded:
            capacity = int(counts.max())
        elif isinstance(self.policy, PadsBuffers):
            capacity = self.policy.capacity(counts)
        if capacity is not None:
            capacity = min(capacity, cost.software.capacity_limit or capacity)
            flows = capped(flows, counts, capacity, placement)
            exchange = padded_exchange(cost, num_tokens, capacity, placement)
            executed = np.where(placement.resident, capacity * len(counts), 0)
            extra_bytes = mask_bytes(cost.work, num_tokens, capacity) if cost.software.padded else 0.0
            flows = Flows(flows.executed, flows.fetch, flows.traffic, computed=executed)
        else:
            exchange, executed, extra_bytes = plain_exchange(cost, flows.traffic, flows.executed), flows.executed, 0.0
        needed = self.held_bytes + layer_bytes(cost.work, exchange.rows, executed) + extra_bytes
        check_memory(needed, self._limit, f"MoE layer {layer}")
        plan_s = cost.plan_s(policy_s, plan_size(flows, counts, placement))
        return flows, exchange, plan_s


def _whole(values: FloatArray) -> IntArray:
    return np.rint(values).astype(np.int64)
