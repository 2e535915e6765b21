"""Fetches from the expert's home rank over the process group, for comparison with systems that send weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from harmoeny.choices import Fetch, WorkOrder
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.memory.fetch.base import FetchStrategy, RankMemory
from harmoeny.runtime.memory.slots import Slot, Transfer


class PeerFetch(FetchStrategy):
    """Home ranks send weights as soon as the plan is known; receivers take them into slots when those are free.

    All ranks know the plan, so nobody has to ask. The weights arrive in memory of their own, as FasterMoE's shadows do
    (doi 10.1145/3503221.3508418), so that no rank ever waits for another one's slots. An expert whose home is this
    rank, but for which it has no slot, comes from host memory.
    """

    name: ClassVar[Fetch] = Fetch.PEER

    def __init__(
        self,
        memory: RankMemory,
        resident: Sequence[BoolArray],
        *,
        num_slots: int | None = None,
        work_order: str = WorkOrder.COVERED,
        home: Sequence[IntArray],
    ) -> None:
        """Reserve slots and make a process group, so that weights never queue behind tokens; all ranks do it together.

        Args:
            memory: shared by the systems of this rank.
            resident: bool ``[num_experts]`` per layer.
            num_slots: slots per layer.
            work_order: as in the base class.
            home: int64 ``[num_experts]`` per layer, the rank that sends an expert.
        """
        super().__init__(memory, resident, num_slots=num_slots, work_order=work_order)
        self._senders = list(home)
        self._comm = memory.comm.duplicate()
        self._arriving: dict[int, tuple[Mapping[str, Tensor], list[Any]]] = {}
        self._sending: list[Any] = []

    def _open_sources(self, layer: int, plan: Plan) -> None:
        rank, device, experts = self._comm.rank, self._comm.device, self.memory.store.layers[layer]
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: dict[int, dict[str, Tensor]] = {}
        for expert_id, dst in zip(*(places.tolist() for places in plan.fetch.nonzero()), strict=True):
            src = int(self._senders[layer][expert_id])
            if src == rank:
                sends += [(w.to(device, non_blocking=True), dst) for w in experts.expert(expert_id).values()]
            elif dst == rank:
                arriving[expert_id] = {
                    name: torch.empty(w.shape[1:], dtype=w.dtype, device=device) for name, w in experts.weights.items()
                }
                receives += [(buffer, src) for buffer in arriving[expert_id].values()]
        copies = self._comm.copy_between_peers(sends, receives)
        works = iter(copies.receiving)
        self._arriving = {
            expert_id: (buffers, [work for _ in buffers for work in next(works)])
            for expert_id, buffers in arriving.items()
        }
        self._sending = copies.sending

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        if expert_id not in self._arriving:
            return super()._fetch_into(slot, expert_id)
        buffers, works = self._arriving[expert_id]
        self._stats.num_peer_fetches += 1

        def arrival() -> None:
            while works:  # a receive can be waited for only once, and an expert may be loaded twice
                works.pop().wait()

        return self.memory.engine.submit(slot, expert_id, buffers, arrival=arrival)

    def _close_sources(self) -> None:
        """Wait until the sends are out; what they read may change afterwards."""
        for work in self._sending:
            work.wait()
        self._arriving, self._sending = {}, []
