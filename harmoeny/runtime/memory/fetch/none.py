"""No fetches: every expert is resident on every rank, the bound that memory sets."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from harmoeny.choices import Fetch
from harmoeny.runtime.device import Device
from harmoeny.runtime.memory.fetch.base import FetchOptions, FetchStrategy, RankMemory
from harmoeny.runtime.memory.slots import SlotPool


class NoFetch(FetchStrategy):
    """All experts in device memory. On a CPU, whose device memory is host memory, the slots refer to the store."""

    name: ClassVar[Fetch] = Fetch.NONE

    def __init__(self, memory: RankMemory, options: FetchOptions) -> None:
        """Reserve a slot for every expert.

        Raises:
            ValueError: an expert is not resident, or there are not slots for all.
        """
        rank = memory.comm.rank
        if any(n is not None for n in options.num_slots) or not all(
            p.resident[:, rank].all() for p in options.placements
        ):
            raise ValueError("fetch: 'none', must go with a placement that holds every expert on every rank")
        if not Device.of(memory.comm.device).has_own_memory:
            memory = replace(memory, pool=SlotPool(memory.store, memory.comm.device))
        super().__init__(memory, options)

    @property
    def fills_slots(self) -> bool:
        """True: also where slots refer to the store, it is to all of a layer in their order."""
        return True

    def prepare(self) -> None:
        """Let the slots hold the experts."""
        if Device.of(self.memory.comm.device).has_own_memory:
            super().prepare()
            return
        for layer in self.memory.pool.layers:
            layer.refer_all()
