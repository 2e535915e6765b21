"""Fetches from the expert's home rank, for comparison with systems that send weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from harmoeny.choices import Exchange, Fetch
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.runtime.device import Device
from harmoeny.runtime.memory.fetch.base import FetchOptions, FetchStrategy, RankMemory
from harmoeny.runtime.memory.slots import Slot, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest


class PeerFetch(FetchStrategy):
    """Home ranks send weights as soon as the plan is known; receivers copy them into slots when those are free.

    All ranks know the plan, so nobody has to ask. The weights arrive in memory of their own, as FasterMoE's shadows do
    (doi 10.1145/3503221.3508418), so that no rank ever waits for another one's slots. An expert whose home is this
    rank, but for which it has no slot, comes from host memory, and so does what the plan says.
    """

    name: ClassVar[Fetch] = Fetch.PEER

    def __init__(self, memory: RankMemory, options: FetchOptions) -> None:
        """Reserve slots and make a process group, so that weights never queue behind tokens; all ranks do it together.

        Args:
            memory: shared by the systems of this rank.
            options: the system's; the homes in its placements send the experts.
        """
        super().__init__(memory, options)
        self._first_senders = [placement.home for placement in options.placements]
        self._senders = list(self._first_senders)
        self._comm = memory.comm.duplicate()
        self._arriving: dict[int, tuple[Mapping[str, Tensor], list[Any]]] = {}
        self._sending: list[Any] = []
        self._arrived_s = 0.0

    def reset(self) -> None:
        """Return to the residents and homes of the beginning."""
        super().reset()
        self._senders = list(self._first_senders)

    def replace_residents(self, layer: int, placement: Placement) -> None:
        """Follow a new placement of a layer: its homes send from now on."""
        super().replace_residents(layer, placement)
        self._senders[layer] = placement.home

    def _open_sources(self, layer: int, fetch: BoolArray) -> None:
        rank, experts = self._comm.rank, self.memory.store.layers[layer]
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: list[int] = []
        expert_ids, receivers = np.nonzero(fetch)
        senders = self._senders[layer][expert_ids]
        most = int(np.unique(np.stack([senders, receivers]), axis=1, return_counts=True)[1].max(initial=0))
        self._comm.reserve(most * experts.expert_bytes, most * len(experts.weights))
        own = (senders == rank) | (receivers == rank)
        self._arrived_s = self.memory.cost.peer_fetches_s(_most_copies(senders, receivers, rank))
        pairs = zip(expert_ids[own].tolist(), senders[own].tolist(), receivers[own].tolist(), strict=True)
        for expert_id, src, dst in pairs:
            if src == rank:
                sends += [(w, dst) for w in self._own_weights(layer, expert_id).values()]
            else:
                arriving.append(expert_id)
                receives += [(w, src) for w in experts.expert(expert_id).values()]
        buffers, copies = self._comm.exchange_tensors(sends, receives, self.memory.transfers.beside)
        by_weight = iter(zip(buffers, copies.receiving, strict=True))
        for expert_id in arriving:
            parts = {name: next(by_weight) for name in experts.weights}
            works = [work for _, of_weight in parts.values() for work in of_weight]
            self._arriving[expert_id] = {name: buffer for name, (buffer, _) in parts.items()}, works
        self._sending = copies.sending

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

    def _arrivals(self) -> dict[int, float]:
        return dict.fromkeys(self._arriving, self._arrived_s)

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        if expert_id not in self._arriving:
            return super()._fetch_into(slot, expert_id)
        buffers, works = self._arriving[expert_id]
        self._stats.num_peer_fetches += 1

        def arrival() -> None:
            while works:  # a receive can be waited for only once, and an expert may be fetched into two slots in turn
                works.pop().wait()

        return self.memory.transfers.submit(CopyRequest(slot, expert_id, buffers, arrival=arrival))

    def _close_sources(self) -> None:
        """Wait until the sends are out; what they read may change afterwards."""
        for work in self._sending:
            work.wait()
        self._arriving, self._sending = {}, []


def _most_copies(senders: IntArray, receivers: IntArray, rank: int) -> int:
    """Return the most copies that a rank, or any that it exchanges some with, sends or receives.

    Args:
        senders: int64 ``[num_copies]``, who sends every copy.
        receivers: int64 ``[num_copies]``, who receives it.
        rank: the rank.
    """
    sent, received = (np.bincount(ranks, minlength=rank + 1) for ranks in (senders, receivers))
    from_others, to_others = senders[receivers == rank], receivers[senders == rank]
    return int(max(sent[rank], received[rank], sent[from_others].max(initial=0), received[to_others].max(initial=0)))
