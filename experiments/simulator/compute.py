"""The compute phase of all ranks: their slots, their schedules and the weights that come meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.routers.base import FloatArray
from experiments.simulator.cost import CostModel
from experiments.simulator.flows import Flows
from experiments.simulator.replay import CopyEngine, Replayed, Sources, replay
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.policy import Policy
from harmoeny.runtime.memory.fetch.peer import PeerFetch
from harmoeny.runtime.memory.fetch.sync import SyncFetch
from harmoeny.runtime.memory.schedule import EMPTY, ExpertWork, home_slots, make_schedule, replace_residents

_TIMES = ("fetch_wait_s", "restore_wait_s", "fetch_s", "restore_s", "restoring_s")
_NUMBERS = ("num_host_fetches", "num_peer_fetches", "num_restores")


@dataclass(frozen=True)
class Computed:
    """What the ranks did in one compute phase; all arrays are ``[world_size]``.

    Attributes:
        end_s: float64, when a rank's computation ends.
        fetch_wait_s: float64, how long it stood still for fetches.
        restore_wait_s: float64, how long it stood still for restores.
        fetch_s: float64, how long its fetches took, added up.
        restore_s: float64, how long its restores take, added up.
        restoring_s: float64, how long the processor is kept from what follows, by the restores.
        num_host_fetches: int64, experts from host memory.
        num_peer_fetches: int64, experts from other ranks.
        num_restores: int64, residents loaded again.
    """

    end_s: FloatArray
    fetch_wait_s: FloatArray
    restore_wait_s: FloatArray
    fetch_s: FloatArray
    restore_s: FloatArray
    restoring_s: FloatArray
    num_host_fetches: IntArray
    num_peer_fetches: IntArray
    num_restores: IntArray


class RankMemories:
    """The slots of all ranks, and their use layer by layer; the counterpart of the runtime's fetch strategies.

    Attributes:
        num_slots: int64 ``[world_size]``, slots of all layers together.
    """

    def __init__(self, policy: Policy, placements: Sequence[Placement], cost: CostModel) -> None:
        self._policy, self._cost = policy, cost
        self._ahead = policy.fetch != SyncFetch.name
        self._home = [
            [home_slots(placement.resident[:, rank], policy.num_slots) for rank in range(placement.world_size)]
            for placement in placements
        ]
        self._held = [_held(home, cost.work.num_experts) for home in self._home]
        self._slot_ready_s: dict[tuple[int, int], dict[int, float]] = {}
        self._moved: dict[tuple[int, int], Replayed] = {}
        self.num_slots: IntArray = np.sum([[len(slots) for slots in layer] for layer in self._home], axis=0)

    def place(self, layer: int, placement: Placement, now_s: FloatArray, copies: Sequence[CopyEngine]) -> FloatArray:
        """Start loading a layer's new residents, which count as fetches; return when every rank can go on."""
        loads = [replace_residents(slots, placement.resident[:, rank]) for rank, slots in enumerate(self._home[layer])]
        self._held[layer] = _held(self._home[layer], placement.num_experts)
        load_s = self._cost.weights_from_host_s(np.array([len(slots) for slots in loads]))
        ready_s = now_s.copy()
        for rank, slots in enumerate(loads):
            moved = Replayed(end_s=float(now_s[rank]), num_host_fetches=len(slots))
            for slot in slots:
                begin_s, end_s = copies[rank].load(moved.end_s, float(load_s[rank]))
                moved.fetch_s += end_s - begin_s
                if self._ahead:
                    self._slot_ready_s.setdefault((layer, rank), {})[slot] = end_s
                else:
                    moved.fetch_wait_s += end_s - moved.end_s
                    moved.end_s = ready_s[rank] = end_s
            if slots:
                self._moved[layer, rank] = moved
        return ready_s

    def run(
        self,
        layer: int,
        flows: Flows,
        placement: Placement,
        copies: Sequence[CopyEngine],
        planned_s: FloatArray,
        start_s: FloatArray,
    ) -> Computed:
        """Execute one layer.

        Args:
            layer: MoE layer in order of execution.
            flows: what is executed where.
            placement: whose home ranks send weights.
            copies: the ranks' copy engines; updated.
            planned_s: float64 ``[world_size]``, when loads may begin.
            start_s: float64 ``[world_size]``, when computation may begin.
        """
        cost = self._cost
        computed = flows.executed if flows.computed is None else flows.computed
        experts_s = cost.experts_s(computed if flows.slices is None else flows.slices)
        if flows.slices is not None:
            experts_s = experts_s.sum(axis=0)
        missing = (computed > 0) & ~self._held[layer]
        from_peers = missing & self._sent_by_peers(placement)
        any_peer = bool(from_peers.any())
        arrival_s = planned_s + self._peers_s(from_peers, placement)
        host_s = cost.weights_from_host_s((missing & ~from_peers).sum(axis=0))
        end_s = start_s + experts_s.sum(axis=0)
        world_size = len(end_s)
        times = {name: np.zeros(world_size) for name in _TIMES}
        numbers = {name: np.zeros(world_size, dtype=np.int64) for name in _NUMBERS}
        waiting = {rank for held_layer, rank in self._moved if held_layer == layer}
        computed_by_rank, expert_s_by_rank = np.ascontiguousarray(computed.T), np.ascontiguousarray(experts_s.T)
        for rank in sorted(waiting.union(np.flatnonzero(missing.any(axis=0)).tolist())):
            arrivals = (
                dict.fromkeys(np.flatnonzero(from_peers[:, rank]).tolist(), float(arrival_s[rank])) if any_peer else {}
            )
            done = self._replay(
                layer,
                rank,
                computed_by_rank[rank],
                expert_s_by_rank[rank],
                Sources(float(host_s[rank]), cost.load_share, arrivals),
                copies[rank],
                (float(planned_s[rank]), float(start_s[rank])),
            )
            end_s[rank] = done.end_s
            moved = self._moved.pop((layer, rank), Replayed(end_s=0.0))
            for name, column in (times | numbers).items():
                column[rank] = getattr(done, name) + getattr(moved, name)
        return Computed(
            end_s,
            times["fetch_wait_s"],
            times["restore_wait_s"],
            times["fetch_s"],
            times["restore_s"],
            times["restoring_s"],
            numbers["num_host_fetches"],
            numbers["num_peer_fetches"],
            numbers["num_restores"],
        )

    def _replay(
        self,
        layer: int,
        rank: int,
        computed: IntArray,
        expert_s: FloatArray,
        sources: Sources,
        copies: CopyEngine,
        times_s: tuple[float, float],
    ) -> Replayed:
        work = [ExpertWork(int(e), 0, int(computed[e])) for e in np.flatnonzero(computed)]
        schedule = make_schedule(work, self._home[layer][rank], self._cost.expert, work_order=self._policy.work_order)
        return replay(
            schedule,
            copies,
            sources,
            lambda item: float(expert_s[item.expert_id]),
            ahead=self._ahead,
            planned_s=times_s[0],
            start_s=times_s[1],
            slot_ready_s=self._slot_ready_s.pop((layer, rank), {}),
        )

    def _sent_by_peers(self, placement: Placement) -> BoolArray:
        """Return bool ``[num_experts, world_size]``, the experts that another rank would send."""
        if self._policy.fetch != PeerFetch.name:
            return np.zeros_like(placement.resident)
        elsewhere: BoolArray = placement.home[:, None] != np.arange(placement.world_size)
        return elsewhere

    def _peers_s(self, from_peers: BoolArray, placement: Placement) -> FloatArray:
        if not from_peers.any():
            return np.zeros(placement.world_size)
        pairs = zip(*np.nonzero(from_peers), strict=True)
        return self._cost.weights_from_peers_s(Counter((int(placement.home[e]), int(dst)) for e, dst in pairs))


def _held(home: Sequence[Sequence[int]], num_experts: int) -> BoolArray:
    """Return bool ``[num_experts, world_size]``, what the slots of all ranks hold."""
    held = np.zeros((num_experts, len(home)), dtype=np.bool_)
    for rank, slots in enumerate(home):
        held[[e for e in slots if e != EMPTY], rank] = True
    return held
