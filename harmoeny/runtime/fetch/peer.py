"""Fetches from the expert's home rank over the process group, for comparison with systems that send weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.fetch.base import FetchStrategy, RankMemory
from harmoeny.runtime.slots import Slot
from harmoeny.runtime.transfer import Transfer


class PeerFetch(FetchStrategy):
    """Home ranks send weights as soon as the plan is known; receivers take them into slots when those are free.

    All ranks know the plan, so nobody has to ask. The weights arrive in memory of their own, as FasterMoE's shadows do
    (doi 10.1145/3503221.3508418), so that no rank ever waits for another one's slots. An expert whose home is this
    rank, but for which it has no slot, comes from host memory.
    """

    name: ClassVar[str] = "peer"

    def __init__(
        self,
        memory: RankMemory,
        resident: Sequence[BoolArray],
        *,
        num_slots: int | None = None,
        work_order: str = "covered",
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
        self._group = dist.new_group() if memory.comm.world_size > 1 else None
        self._arriving: dict[int, tuple[Mapping[str, Tensor], list[Any]]] = {}
        self._sending: list[Any] = []

    def _open_sources(self, layer: int, plan: Plan) -> None:
        rank, experts = self.memory.comm.rank, self.memory.store.layers[layer]
        operations: list[dist.P2POp] = []
        receives: list[tuple[int, dict[str, Tensor], slice]] = []
        for expert_id, dst in zip(*plan.fetch.nonzero(), strict=True):
            src = int(self._senders[layer][expert_id])
            if src == rank:
                for w in experts.expert(int(expert_id)).values():
                    tensor = w.to(self.memory.comm.device, non_blocking=True)
                    operations.append(dist.P2POp(dist.isend, tensor, int(dst), self._group))
            elif dst == rank:
                buffers = {
                    name: torch.empty(w.shape[1:], dtype=w.dtype, device=self.memory.comm.device)
                    for name, w in experts.weights.items()
                }
                part = slice(len(operations), len(operations) + len(buffers))
                receives.append((int(expert_id), buffers, part))
                operations += [dist.P2POp(dist.irecv, b, src, self._group) for b in buffers.values()]
        works = dist.batch_isend_irecv(operations) if operations else []
        # NCCL coalesces a batch into one work, gloo has one per tensor.
        separate = len(works) == len(operations)
        self._arriving = {e: (buffers, works[part] if separate else [*works]) for e, buffers, part in receives}
        self._sending = [work for i, work in enumerate(works) if not separate or operations[i].op is dist.isend]

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        if expert_id not in self._arriving:
            return super()._fetch_into(slot, expert_id)
        buffers, works = self._arriving[expert_id]
        self._stats.num_peer_fetches += 1

        def arrival() -> None:
            while works:  # gloo's receives can be waited for only once, and an expert may be loaded twice
                works.pop().wait()

        return self.memory.engine.submit(slot, expert_id, buffers, arrival=arrival)

    def _close_sources(self) -> None:
        """Wait until the sends are out; what they read may change afterwards."""
        for work in self._sending:
            work.wait()
        self._arriving, self._sending = {}, []
