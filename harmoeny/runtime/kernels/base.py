"""The interface of a kernel, and where it leaves its results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from harmoeny.runtime.memory.slots import LayerSlots
from harmoeny.runtime.memory.waves import Schedule, Wave


class Results:
    """Results of a layer's rows, as waves leave them; those of a single wave are taken as they are, without a copy."""

    def __init__(self, rows_RH: Tensor) -> None:
        """Begin with none; ``rows_RH``: ``[R, H]``, the rows that are executed."""
        self._rows_RH = rows_RH
        self._results_RH: Tensor | None = None

    def room(self, part: slice) -> Tensor:
        """Return where the results of some rows are to be written."""
        return self.rows()[part]

    def put(self, part: slice, results: Tensor) -> None:
        """Take the results of some rows."""
        if self._results_RH is None and len(results) == len(self._rows_RH):
            self._results_RH = results
        else:
            self.room(part).copy_(results)

    def rows(self) -> Tensor:
        """Return ``[R, H]``, all results."""
        if self._results_RH is None:
            self._results_RH = torch.empty_like(self._rows_RH)
        return self._results_RH


class Kernel(ABC):
    """Computes the experts of one layer on one rank, wave by wave, from the layer's slots.

    Attributes:
        name: its name in records.
        grouped: whether it computes a wave at once; it then needs a grouped schedule.
        slots: the layer's slots.
    """

    name: str
    grouped: ClassVar[bool]

    def __init__(self, slots: LayerSlots) -> None:
        self.slots = slots

    def begin(self, schedule: Schedule) -> None:  # noqa: B027  (not every kernel has to)
        """Prepare for a batch's waves, before anything is queued that could be waited for."""

    @abstractmethod
    def __call__(self, wave: Wave, rows_RH: Tensor, results: Results) -> None:
        """Compute one wave; its weights are in its slots.

        Args:
            wave: the wave.
            rows_RH: ``[R, H]``, the rows of the whole schedule.
            results: takes the results.
        """
