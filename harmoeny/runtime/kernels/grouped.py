"""All experts of a wave in one call for each of their matrices, over rows that are ordered by slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.runtime.device import Device
from harmoeny.runtime.kernels.alone import NOTHING_ALONE, Alone, find_alone, least_rows_alone
from harmoeny.runtime.kernels.base import Kernel, Results
from harmoeny.runtime.kernels.gates import fastest_gate
from harmoeny.runtime.memory.experts import ExpertMLP, LayerExperts
from harmoeny.runtime.memory.slots import LayerSlots
from harmoeny.runtime.memory.waves import Schedule, Wave


class GroupedProducts(ABC):
    """Multiplies groups of rows, one group per slot, by the matrices in the slots."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def supports(device: torch.device, experts: LayerExperts) -> bool:
        """Return whether it can compute such experts on the device, faster than one after another on CUDA."""

    @abstractmethod
    def __call__(
        self, rows: Tensor, ends: Tensor, matrices: Tensor, bias: Tensor | None, alone: Alone = NOTHING_ALONE
    ) -> Tensor:
        """Compute ``rows @ matrices[slot] + bias[slot]``, without waiting for the device.

        Args:
            rows: ``[n, in]``, ordered by slot; rows behind the last end belong to none and have any results.
            ends: int32 ``[num_slots]`` on the device, one behind the last row of every slot.
            matrices: ``[num_slots, in, out]``, in memory in this order or as ``[num_slots, out, in]``.
            bias: ``[num_slots, out]``.
            alone: slots that are multiplied for themselves.

        Returns:
            ``[n, out]``.
        """


class GroupedKernel(Kernel):
    """Computes waves with grouped products; no host work per expert, but for the largest."""

    grouped: ClassVar[bool] = True

    def __init__(self, slots: LayerSlots, products: GroupedProducts) -> None:
        """Take a layer whose experts the products support."""
        super().__init__(slots)
        function = slots.experts.function
        assert isinstance(function, ExpertMLP), "the products support it"
        self._function = replace(function, between=fastest_gate(function.between, slots.device))
        self.name = products.name
        self.products = products
        self._ends_WS = torch.empty(0)
        self._alone: list[Alone] = []

    @cached_property
    def least_rows_alone(self) -> int | None:
        """From how many rows on a slot is multiplied for itself; None: none is, as Triton does not do the others."""
        num_multiprocessors = Device.of(self.slots.device).num_multiprocessors
        if num_multiprocessors is None or find_spec("triton") is None:
            return None
        dim = 2 if self._function.transposed else 1
        num_out = min(w.shape[dim] for w in self.slots.experts.weights.values() if w.ndim == 3)
        return least_rows_alone(num_multiprocessors, num_out)

    def begin(self, schedule: Schedule) -> None:
        """Bring the ends of all groups to the device."""
        tokens_WS = np.zeros((len(schedule.ends), len(self.slots.slots)), dtype=np.int32)
        for wave in schedule.waves():
            tokens_WS[wave.number, wave.slots] = wave.num_tokens
        self._ends_WS = Device.of(self.slots.device).upload(tokens_WS.cumsum(axis=1, dtype=np.int32))
        least = self.least_rows_alone
        self._alone = [NOTHING_ALONE if least is None else find_alone(tokens_S, least) for tokens_S in tokens_WS]

    def __call__(self, wave: Wave, rows_RH: Tensor, results: Results) -> None:
        """Compute a wave at once."""
        ends, alone = self._ends_WS[wave.number], self._alone[wave.number]
        results.put(wave.rows, self.apply(rows_RH[wave.rows], ends, alone))

    def apply(self, rows: Tensor, ends: Tensor, alone: Alone = NOTHING_ALONE) -> Tensor:
        """Return ``[n, H]``, the results of rows ``[n, H]``; the rest as for :meth:`GroupedProducts.__call__`."""
        function, weights = self._function, self.slots.weights

        def linear(name: str, rows: Tensor) -> Tensor:
            matrices = weights[name] if function.transposed else weights[name].transpose(1, 2)
            return self.products(rows, ends, matrices, weights.get(f"{name}_bias"), alone)

        return function.compose(rows, linear)
