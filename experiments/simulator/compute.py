"""The compute phase of all ranks: the runtime's own fetch strategies, each on its rank's virtual clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.routers.base import FloatArray
from experiments.simulator.cost import CostModel
from experiments.simulator.exchange import Arrivals
from experiments.simulator.flows import Flows
from experiments.simulator.virtual import META, VirtualCommunicator, VirtualTransfers
from harmoeny.choices import Fetch
from harmoeny.moves import move_sources
from harmoeny.placement import BoolArray, IntArray, Placement, with_slot
from harmoeny.policy import Policy
from harmoeny.predict import machine_costs
from harmoeny.runtime.device import span_s
from harmoeny.runtime.memory.experts import ExpertStore, LayerExperts
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import FetchStats, FetchStrategy, RankMemory
from harmoeny.runtime.memory.residents import num_slots_needed
from harmoeny.runtime.memory.slots import SlotPool
from harmoeny.runtime.memory.waves import Wave
from harmoeny.shared import slots_of

_COUNTS = (
    "num_host_fetches", "num_peer_fetches", "num_halved_fetches", "num_restores", "fetch_bytes", "host_tokens",
    "activation_bytes", "num_misses", "num_ahead", "num_ahead_used",
)  # fmt: skip
_TIMES = ("fetch_s", "fetch_wait_s", "restore_s", "restore_wait_s", "host_s", "host_wait_s")


@dataclass(frozen=True)
class Computed:
    """What the ranks did in one compute phase; all arrays are ``[world_size]``.

    Attributes:
        end_s: float64, when a rank's computation ends.
        stage_end_s: float64 ``[num_stages, world_size]``, when that of every stage of the exchange does.
        restoring_s: float64, how long restores keep the processor from what follows.
        columns: the columns of ``layers.parquet`` about fetches, restores and hosts: int64, and float64 in seconds.
    """

    end_s: FloatArray
    stage_end_s: FloatArray
    restoring_s: FloatArray
    columns: dict[str, IntArray | FloatArray]


@dataclass(frozen=True)
class _Rank:
    """A rank that has fetched something.

    Attributes:
        transfers: its clock and its host link.
        comm: its place among the ranks.
        fetcher: its expert memory.
    """

    transfers: VirtualTransfers
    comm: VirtualCommunicator
    fetcher: FetchStrategy


class RankMemories:
    """The expert memory of all ranks.

    Most ranks hold all that they execute, so only those that ever lack an expert get a fetch strategy.

    Attributes:
        num_slots: int64 ``[world_size]``, slots of all layers together.
    """

    def __init__(self, policy: Policy, placements: Sequence[Placement], cost: CostModel) -> None:
        """Fill the slots.

        Args:
            policy: names the fetch strategy and its options.
            placements: residency per layer before the first batch.
            cost: times of copies and computation.
        """
        self._policy, self._cost, self._first_placements = policy, cost, list(placements)
        self._placements = list(placements)
        self._slots_of_layer = [
            num_slots_needed(p.resident.sum(axis=0), p.num_experts, slots_of(policy, p)) for p in placements
        ]
        self._held = [with_slot(p.resident, n) for p, n in zip(placements, self._slots_of_layer, strict=True)]
        self._moved = np.zeros((len(placements), cost.topology.world_size), dtype=np.bool_)
        weights = torch.empty(cost.work.all_experts, cost.work.expert_bytes, dtype=torch.uint8, device=META)
        experts = LayerExperts({"weights": weights}, lambda *_: None, cost.work.hidden_size)
        self._store = ExpertStore([experts] * len(placements))
        self._ranks: dict[int, _Rank] = {}
        self.num_slots: IntArray = np.sum(self._slots_of_layer, axis=0)

    def replace_residents(
        self, layer: int, placement: Placement, now_s: FloatArray, *, ahead: bool = False
    ) -> FloatArray:
        """Start copying a layer's new residents, which count as fetches; return when every rank can go on."""
        held = with_slot(placement.resident, self._slots_of_layer[layer])
        new, before = held & ~self._held[layer], self._placements[layer]
        from_peers, changed = np.zeros_like(new), (held != self._held[layer]).any(axis=0)
        if self._policy.fetch == Fetch.PEER:
            changed[:] = True  # all know where the homes are
        if self._policy.fetch == Fetch.PEER and not ahead:
            expert = self._cost.expert
            sources = move_sources(new, self._held[layer], before.home, machine_costs(expert), expert.links)
            from_peers = sources.from_peer
        copy_s = self._cost.weights_from_host_s((new & ~from_peers).sum(axis=0))
        arrival_s = now_s + self._peers_s(from_peers, before)
        ready_s = now_s.copy()
        for rank in np.flatnonzero(changed).tolist():
            own = self._rank(rank)
            transfers = own.transfers
            transfers.now_s, transfers.copy_s = float(now_s[rank]), float(copy_s[rank])
            own.comm.arrival_s = float(arrival_s[rank])
            own.fetcher.replace_residents(layer, placement, ahead=ahead)
            transfers.owed_s = 0.0  # moves of residents are taken to leave the processor alone
            ready_s[rank] = transfers.now_s
        self._held[layer], self._moved[layer] = held, self._moved[layer] | new.any(axis=0)
        self._placements[layer] = placement
        return ready_s

    def run(
        self,
        layer: int,
        flows: Flows,
        placement: Placement,
        retained: Placement | None = None,
        *,
        planned_s: FloatArray,
        start_s: FloatArray,
        arrivals: Arrivals,
        pace: FloatArray,
    ) -> Computed:
        """Execute one layer.

        Args:
            layer: MoE layer in order of execution.
            flows: what is executed where.
            placement: whose home ranks send weights.
            retained: the residents after the layer; None: those before it.
            planned_s: float64 ``[world_size]``, when fetches may begin.
            start_s: float64 ``[world_size]``, when computation may begin.
            arrivals: when the rows of every stage of the exchange are there.
            pace: float64 ``[world_size]``, how many times as long every rank computes as the cost model says.
        """
        cost = self._cost
        computed, stages = flows.rows, flows.stages
        host = np.zeros_like(flows.fetch) if flows.host is None else flows.host
        missing = (computed > 0) & ~self._held[layer] & ~host
        after = self._held[layer]
        if retained is not None:
            after = with_slot(retained.resident, self._slots_of_layer[layer])
        changing = (host | (after != self._held[layer])).any(axis=0)
        from_peers = np.zeros_like(missing)
        if self._policy.fetch == Fetch.PEER:
            from_peers = flows.fetch if flows.from_peer is None else flows.fetch & flows.from_peer
        halved = np.zeros_like(missing) if flows.halved is None else from_peers & flows.halved
        arrival_s = planned_s + self._peers_s(from_peers, placement, flows.senders, halved)
        host_s = cost.weights_from_host_s((missing & ~from_peers).sum(axis=0) + (missing & halved).sum(axis=0) / 2)
        stage_end_s, end_s = np.empty_like(arrivals.arrived_s), start_s
        for stage, (arrived_s, ordering_s) in enumerate(zip(arrivals.arrived_s, arrivals.ordering_s, strict=True)):
            end_s = np.maximum(end_s, arrived_s) + ordering_s + cost.experts_s(stages[stage : stage + 1]) * pace
            stage_end_s[stage] = end_s
        restoring_s = np.zeros(len(end_s))
        columns: dict[str, IntArray | FloatArray] = {name: np.zeros(len(end_s), dtype=np.int64) for name in _COUNTS}
        columns |= {name: np.zeros(len(end_s)) for name in _TIMES}
        for rank in np.flatnonzero(missing.any(axis=0) | self._moved[layer] | changing).tolist():
            own = self._rank(rank)
            transfers = own.transfers
            transfers.copy_s, transfers.restoring_s = float(host_s[rank]), 0.0
            own.comm.arrival_s = float(arrival_s[rank])
            transfers.now_s = float(planned_s[rank])
            if retained is not None:
                own.fetcher.retain(retained)
            head_s, rest_s = cost.expert.head_s(flows.traffic, rank, flows.first_traffic())
            own.fetcher.begin(
                layer,
                flows.fetch,
                np.ascontiguousarray(stages[:, :, rank]),
                from_peer=flows.from_peer,
                senders=flows.senders,
                halved=flows.halved,
                grouped=cost.grouped,
                head_s=head_s,
                rest_s=rest_s,
                host_E=host[:, rank],
            )
            transfers.now_s = float(start_s[rank])
            stats, stage_end_s[:, rank] = self._execute(own, rank, float(pace[rank]), arrivals)
            end_s[rank], restoring_s[rank] = transfers.now_s, transfers.restoring_s
            found = _columns(stats, transfers.copy_s)
            if host[:, rank].any():
                on_host = self._host_columns(computed[host[:, rank], rank], float(pace[rank]))
                host_end_s = float(start_s[rank]) + on_host["host_s"] + cost.expert.host_trip_s
                found |= on_host | {"host_wait_s": max(0.0, host_end_s - end_s[rank])}
                end_s[rank] = max(end_s[rank], host_end_s)
            for name, value in found.items():
                columns[name][rank] = value
        self._moved[layer], self._held[layer] = False, after
        return Computed(end_s, stage_end_s, restoring_s, columns)

    def _host_columns(self, num_tokens: IntArray, pace: float) -> dict[str, int | float]:
        """Return the columns about what a rank's host executes; ``num_tokens``: int64, rows of every slice."""
        expert = self._cost.expert
        total = int(num_tokens.sum())
        return {
            "host_tokens": total,
            "activation_bytes": 2 * total * self._cost.work.row_bytes,
            "host_s": (expert.host_s(num_tokens.tolist()) - expert.host_trip_s) * pace,
        }

    def end_batch(self) -> FloatArray:
        """Complete all copies and set the clocks back to 0.

        Returns:
            float64 ``[world_size]``, when a rank's last copy ends.
        """
        drained_s = np.zeros(self._cost.topology.world_size)
        for rank, own in self._ranks.items():
            own.fetcher.finish()
            drained_s[rank] = own.transfers.free_s
            own.transfers.restart()
        return drained_s

    def _rank(self, rank: int) -> _Rank:
        if rank not in self._ranks:
            transfers = VirtualTransfers(self._cost.expert.copy_share)
            comm = VirtualCommunicator(rank, self._cost.topology.world_size, transfers)
            memory = RankMemory(self._store, SlotPool(self._store, META), transfers, comm, self._cost.expert)
            self._ranks[rank] = _Rank(transfers, comm, make_fetcher(self._policy, self._first_placements, memory))
        return self._ranks[rank]

    def _execute(self, own: _Rank, rank: int, pace: float, arrivals: Arrivals) -> tuple[FetchStats, FloatArray]:
        """Run a rank's layer, wave by wave; return when every stage ended, too.

        Args:
            own: what the rank has.
            rank: the rank.
            pace: how many times as long it takes as the cost model says.
            arrivals: when rows are there.
        """
        transfers, arrived_s, ordering_s = own.transfers, arrivals.arrived_s[:, rank], arrivals.ordering_s[:, rank]
        end_s, begun = arrived_s.copy(), np.zeros(len(arrived_s), dtype=np.bool_)

        def execute(wave: Wave) -> None:
            if not begun[wave.stage]:
                transfers.now_s = max(transfers.now_s, float(arrived_s[wave.stage])) + float(ordering_s[wave.stage])
                begun[wave.stage] = True
            transfers.compute(self._cost.wave_s(wave.num_tokens) * pace)
            end_s[wave.stage] = transfers.now_s

        stats = own.fetcher.run(execute)
        return stats, np.maximum.accumulate(end_s)

    def _peers_s(
        self,
        from_peers: BoolArray,
        placement: Placement,
        senders: IntArray | None = None,
        halved: BoolArray | None = None,
    ) -> FloatArray:
        """Return float64 ``[world_size]``, how long ranks wait for weights, or halves, that peers send or hand on."""
        if not from_peers.any():
            return np.zeros(placement.world_size)
        if senders is not None:
            return self._cost.weights_handed_on_s(senders, placement.home, halved)
        sent: dict[tuple[int, int], float] = defaultdict(float)
        for expert_id, dst in np.argwhere(from_peers).tolist():
            sent[int(placement.home[expert_id]), dst] += 0.5 if halved is not None and halved[expert_id, dst] else 1.0
        return self._cost.weights_from_peers_s(sent)


def _columns(stats: FetchStats, copy_s: float) -> dict[str, int | float]:
    """Return one rank's columns; a restore takes ``copy_s`` whenever it will run."""
    return {
        "num_host_fetches": stats.num_host_fetches,
        "num_peer_fetches": stats.num_peer_fetches,
        "num_halved_fetches": stats.num_halved_fetches,
        "num_misses": stats.num_misses,
        "num_restores": len(stats.restores),
        "fetch_bytes": stats.fetch_bytes,
        "num_ahead": stats.num_ahead,
        "num_ahead_used": stats.num_ahead_used,
        "fetch_s": sum(span_s(t.span) for t in stats.fetches if t.span is not None),
        "fetch_wait_s": sum(map(span_s, stats.fetch_waits)),
        "restore_s": len(stats.restores) * copy_s,
        "restore_wait_s": sum(map(span_s, stats.restore_waits)),
    }
