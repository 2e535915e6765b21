"""Fetches from other ranks: an expert's home, or one that fetches it too and hands it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from harmoeny.choices import Exchange, Fetch
from harmoeny.moves import move_sources
from harmoeny.placement import BoolArray, IntArray, Placement, with_slot
from harmoeny.predict import machine_costs, no_halves
from harmoeny.relay import num_hops, relayed_s
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import halves_of
from harmoeny.runtime.memory.fetch.base import FetchOptions, FetchStrategy, RankMemory
from harmoeny.runtime.memory.residents import num_slots_needed
from harmoeny.runtime.memory.slots import Slot, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest
from harmoeny.sources import arrivals_s
from harmoeny.wire import nodes


@dataclass
class _Arriving:
    """Weights on their way between ranks.

    Attributes:
        experts: what this rank receives, by expert: weights, and what to wait for before they are read.
        arrivals: the latter again, for whoever hands an expert on.
        sending: what to wait for before what this rank sends may change.
    """

    experts: dict[int, tuple[Mapping[str, Tensor], list[Any]]] = field(default_factory=dict)
    arrivals: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    sending: list[Any] = field(default_factory=list)

    def copy_into(self, slot: Slot, expert_id: int, rest: Mapping[str, Tensor] | None = None) -> CopyRequest:
        """Return the copy of an expert into a slot; ``rest``: as of the request, where only halves arrive."""
        buffers, works = self.experts[expert_id]

        def arrival() -> None:
            while works:  # a receive can be waited for only once, and an expert may be fetched into two slots in turn
                works.pop().wait()

        return CopyRequest(slot, expert_id, buffers, arrival=arrival, rest=rest)

    def finish(self) -> None:
        """Wait until the sends are out."""
        for work in self.sending:
            work.wait()
        self.experts, self.arrivals, self.sending = {}, {}, []


class _Sent(NamedTuple):
    """An expert that goes from rank to rank, or only the first half of every weight."""

    expert_id: int
    src: int
    dst: int
    half: bool


def _parts(weights: Mapping[str, Tensor], half: bool) -> Mapping[str, Tensor]:
    """Return what is sent of an expert's weights: all, or the first halves of those that have more than one row."""
    if not half:
        return weights
    halves = {name: halves_of(weight)[0] for name, weight in weights.items()}
    return {name: first for name, first in halves.items() if len(first) > 0}


class PeerFetch(FetchStrategy):
    """Home ranks send weights as soon as the plan is known; receivers copy them into slots when those are free.

    Where the plan says so, and ranks write into each other's memory, receivers hand weights on when they are there.

    All ranks know the plan, so nobody has to ask. The weights arrive in memory of their own, as FasterMoE's shadows do
    (doi 10.1145/3503221.3508418), so that no rank ever waits for another one's slots. An expert whose home is this
    rank, but for which it has no slot, comes from host memory, and so does what the plan says, or half of it. New
    residents come from the ranks that were their homes, or from host memory, as
    :func:`harmoeny.moves.move_sources` decides.
    """

    name: ClassVar[Fetch] = Fetch.PEER

    def __init__(self, memory: RankMemory, options: FetchOptions) -> None:
        """Reserve slots and make process groups, so that weights never queue behind tokens; all ranks do it together.

        Args:
            memory: shared by the systems of this rank.
            options: the system's; the homes in its placements send the experts.
        """
        super().__init__(memory, options)
        self._first_placements = list(options.placements)
        self._placements = list(options.placements)
        self._num_slots = [
            num_slots_needed(p.resident.sum(axis=0), p.num_experts, n)
            for p, n in zip(options.placements, options.num_slots, strict=True)
        ]
        self._costs = machine_costs(memory.cost)
        self._comm = memory.comm.duplicate()
        self._moves_comm = memory.comm.duplicate() if options.moves else self._comm
        self._fetching, self._moving = _Arriving(), _Arriving()
        self._moved_slots: list[tuple[Slot, Transfer]] = []
        self._arrived_s = 0.0
        self._halved_here: Set[int] = frozenset()

    def reset(self) -> None:
        """Return to the residents and homes of the beginning."""
        super().reset()
        self._placements = list(self._first_placements)

    def _open_moves(self, layer: int, placement: Placement, *, ahead: bool) -> None:
        before, self._placements[layer] = self._placements[layer], placement
        if ahead:
            return
        held, wanted = (with_slot(p.resident, self._num_slots[layer]) for p in (before, placement))
        sources = move_sources(wanted & ~held, held, before.home, self._costs, self.memory.cost.links)
        self._moving = self._exchange(self._moves_comm, layer, sources.from_peer, before.home)

    def _move_into(self, layer: int, slot: Slot, expert_id: int, *, urgent: bool) -> Transfer:
        if not urgent or expert_id not in self._moving.experts:
            return super()._move_into(layer, slot, expert_id, urgent=urgent)
        self._moved[layer].num_peer_fetches += 1
        transfer = self.memory.transfers.submit(self._moving.copy_into(slot, expert_id))
        self._moved_slots.append((slot, transfer))
        return transfer

    def _open_sources(self, layer: int, fetch: BoolArray, senders: IntArray | None, halved: BoolArray | None) -> None:
        self._halved_here = frozenset()
        if not fetch.any():
            self._fetching = _Arriving()
            return
        home, costs = self._placements[layer].home, self._costs
        if costs.peer_fetch_s <= 0:  # not measured
            costs = costs._replace(peer_fetch_s=costs.fetch_s)
        links, half = self.memory.cost.links, no_halves()
        if halved is not None:
            half = fetch & halved
            self._halved_here = frozenset(np.flatnonzero(half[:, self._comm.rank]).tolist())
        if senders is None:
            arrived_s = arrivals_s(fetch, half, home, costs, links)
        else:
            arrived_s = relayed_s(senders, half, home, nodes(len(fetch[0]), costs), costs, links)
        self._arrived_s = float(arrived_s[self._comm.rank])
        self._fetching = self._exchange(self._comm, layer, fetch, home, senders, halved)

    def _exchange(
        self,
        comm: Communicator,
        layer: int,
        sent: BoolArray,
        home: IntArray,
        senders: IntArray | None = None,
        halved: BoolArray | None = None,
    ) -> _Arriving:
        """Start sending and receiving weights, and what is handed on as soon as it is here.

        Args:
            comm: whose traffic this is.
            layer: MoE layer in order of execution.
            sent: bool ``[num_experts, world_size]``, the ranks that every expert goes to.
            home: int64 ``[num_experts]``, who sends it.
            senders: int64 ``[num_experts, world_size]``, who does, as of a plan; None, or where ranks cannot hand
                weights on: home ranks.
            halved: bool ``[num_experts, world_size]``, of which only the first halves go there; None: none.
        """
        if not sent.any():
            return _Arriving()
        experts = self.memory.store.layers[layer]
        handed_on = senders is not None and comm.exchange == Exchange.PUT
        senders = senders if senders is not None and handed_on else np.broadcast_to(home[:, None], sent.shape)
        expert_ids, receivers = np.nonzero(sent)
        sources = senders[expert_ids, receivers]
        most = int(np.unique(np.stack([sources, receivers]), axis=1, return_counts=True)[1].max(initial=0))
        comm.reserve(most * experts.expert_bytes, most * len(experts.weights))
        if handed_on and comm.exchange != Exchange.PUT:  # since there was no room
            return self._exchange(comm, layer, sent, home, None, halved)
        started = _Arriving()
        hops = num_hops(sent, senders, home)[expert_ids, receivers] if handed_on else np.ones_like(sources)
        own = (sources == comm.rank) | (receivers == comm.rank)
        half = np.zeros_like(sent) if halved is None else halved
        for hop in range(1, int(hops.max()) + 1):
            now = own & (hops == hop)
            pairs = zip(expert_ids[now].tolist(), sources[now].tolist(), receivers[now].tolist(), strict=True)
            self._send(comm, layer, [_Sent(e, src, dst, bool(half[e, dst])) for e, src, dst in pairs], started)
        return started

    def _send(self, comm: Communicator, layer: int, ready: Sequence[_Sent], started: _Arriving) -> None:
        """Start sending and receiving what is ready at the same time."""
        rank, experts = comm.rank, self.memory.store.layers[layer]
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: dict[int, Mapping[str, Tensor]] = {}
        awaited: list[Any] = []
        for expert_id, src, dst, half in ready:
            if src == rank and expert_id in started.experts:
                weights, _ = started.experts[expert_id]
                awaited += started.arrivals[expert_id]
                sends += [(w, dst) for w in _parts(weights, half).values()]
            elif src == rank:
                sends += [(w, dst) for w in _parts(self._own_weights(layer, expert_id), half).values()]
            elif dst == rank:
                arriving[expert_id] = _parts(experts.expert(expert_id), half)
                receives += [(w, src) for w in arriving[expert_id].values()]

        def beside(work: Callable[[], None]) -> Any:
            def behind_arrivals() -> None:
                for arrival in awaited:
                    arrival.wait()
                work()

            return self.memory.transfers.beside(behind_arrivals)

        buffers, copies = comm.exchange_tensors(sends, receives, beside)
        by_weight = iter(zip(buffers, copies.receiving, strict=True))
        started.sending += copies.sending
        for expert_id, expected in arriving.items():
            parts = {name: next(by_weight) for name in expected}
            works = [work for _, of_weight in parts.values() for work in of_weight]
            started.experts[expert_id] = {name: buffer for name, (buffer, _) in parts.items()}, works
            started.arrivals[expert_id] = tuple(works)

    def _own_weights(self, layer: int, expert_id: int) -> Mapping[str, Tensor]:
        """Return what is sent of an expert whose home is this rank: its slot, else the store.

        A slot is overwritten only behind what the queue of fetches was given before; puts go through that queue, but a
        process group sends whenever it likes. On a CPU the store is as near, and no restore has to come first.
        """
        slot = self.residents(layer).get(expert_id)
        in_order = self._comm.exchange == Exchange.PUT and Device.of(self._comm.device).has_own_memory
        if slot is None or not in_order:
            return self.memory.store.layers[layer].expert(expert_id)
        self.memory.transfers.wait(slot)
        return slot.weights

    def _halved(self) -> Set[int]:
        return self._halved_here

    def _arrivals(self) -> dict[int, float]:
        return dict.fromkeys(self._fetching.experts, self._arrived_s)

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        if expert_id not in self._fetching.experts:
            return super()._fetch_into(slot, expert_id)
        self._stats.num_peer_fetches += 1
        rest = None
        if expert_id in self._halved_here:
            self._stats.num_halved_fetches += 1
            rest = self.memory.store.layers[self._layer].expert(expert_id)
        return self.memory.transfers.submit(self._fetching.copy_into(slot, expert_id, rest))

    def _close_sources(self) -> None:
        """Wait until everything is out, and new residents are in: what they are read from may change afterwards."""
        for slot, transfer in self._moved_slots:
            if slot.transfer is transfer:
                self._wait(slot, self._stats)
        self._moved_slots = []
        self._moving.finish()
        self._fetching.finish()
