"""Blocking fetches: an expert that the rank does not hold is copied in just before it is executed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from harmoeny.placement import BoolArray
from harmoeny.runtime.experts import ExpertStore, LayerExperts
from harmoeny.runtime.fetch.base import Execute, ExpertWork, FetchStats, FetchStrategy


class SyncFetch(FetchStrategy):
    """The ablation of HarMoEny without overlap: computation waits for every copy.

    Residents are used in place on a CPU, whose device memory is host memory; a CUDA device gets copies of them. One
    slot takes the fetched experts in turn.
    """

    name: ClassVar[str] = "sync"

    def __init__(self, store: ExpertStore, resident: BoolArray, device: torch.device) -> None:
        super().__init__(store, resident, device)
        self._held: list[dict[int, dict[str, Tensor]]] = [
            {
                e: {name: w.to(device, non_blocking=True) for name, w in layer.expert(e).items()}
                for e in range(layer.num_experts)
                if resident[e]
            }
            for layer in store.layers
        ]
        self._slots: dict[tuple[torch.Size, ...], dict[str, Tensor]] = {}
        for layer in store.layers:
            if _shapes(layer) not in self._slots:
                self._slots[_shapes(layer)] = {
                    name: torch.empty(w.shape[1:], dtype=w.dtype, device=device) for name, w in layer.weights.items()
                }

    def run(self, layer: int, work: Sequence[ExpertWork], execute: Execute) -> FetchStats:
        """Execute the residents, then fetch and execute the others one by one."""
        held = self._held[layer]
        missing = []
        for item in work:
            if item.expert_id in held:
                execute(item, held[item.expert_id])
            else:
                missing.append(item)
        copy_s = 0.0
        for item in missing:
            if self.device.type == "cuda":
                # A blocking copy also waits for the kernels before it: let them end first, they are not part of it.
                torch.cuda.current_stream(self.device).synchronize()
            start = time.perf_counter()
            weights = self._fetch(layer, item.expert_id)
            copy_s += time.perf_counter() - start
            execute(item, weights)
        fetch_bytes = len(missing) * self.store.layers[layer].expert_bytes
        return FetchStats(len(missing), fetch_bytes, fetch_s=copy_s, fetch_wait_s=copy_s)

    def _fetch(self, layer: int, expert_id: int) -> dict[str, Tensor]:
        experts = self.store.layers[layer]
        slot = self._slots[_shapes(experts)]
        for name, source in experts.expert(expert_id).items():
            slot[name].copy_(source)
        return slot


def _shapes(layer: LayerExperts) -> tuple[torch.Size, ...]:
    return tuple(w.shape[1:] for w in layer.weights.values())
