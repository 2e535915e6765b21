"""Device memory for experts: slots of one expert each, which the systems of a rank use in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harmoeny.runtime.device import Span
from harmoeny.runtime.memory.experts import ExpertStore, LayerExperts
from harmoeny.runtime.memory.schedule import EMPTY


@dataclass(eq=False)
class Transfer:
    """One copy of an expert into a slot.

    Attributes:
        span: its begin and end; None until it is complete (CUDA: until it is queued).
        urgent: a fetch; False for a restore, which waits until no fetch does.
    """

    span: Span | None = None
    urgent: bool = True


@dataclass(eq=False)
class Slot:
    """Room for one expert of one layer in device memory.

    Attributes:
        experts: the layer's experts, of which the slot holds one.
        device: where the buffers are.
        expert_id: the expert that the slot holds, or will hold after :attr:`transfer`; ``EMPTY`` for none.
        weights: its weights by name, each ``[...]`` without the layer's first dimension; valid after :attr:`transfer`.
        transfer: the copy into the slot that nobody has waited for yet.
        last_use: on CUDA, the event behind the last computation that reads the slot.
    """

    experts: LayerExperts
    device: torch.device
    expert_id: int = EMPTY
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    transfer: Transfer | None = None
    last_use: torch.cuda.Event | None = None
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The slot's own memory by name, allocated at the first use."""
        if not self._buffers:
            self._buffers = {
                name: torch.empty(w.shape[1:], dtype=w.dtype, device=self.device)
                for name, w in self.experts.weights.items()
            }
        return self._buffers

    def fill(self, source: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copy an expert's weights into the slot."""
        for name, buffer in self.buffers.items():
            buffer.copy_(source[name], non_blocking=non_blocking)
        self.weights = self.buffers

    def refer(self, source: Mapping[str, Tensor]) -> None:
        """Let the slot hold weights without a copy, where device memory is host memory."""
        self.weights = source


class SlotPool:
    """The slots of a rank, by layer; one pool serves all its systems, since they take turns.

    Attributes:
        slots: per layer; as many as the system with the most needs.
    """

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self.slots: list[list[Slot]] = [[] for _ in store.layers]

    def reserve(self, layer: int, num_slots: int) -> Sequence[Slot]:
        """Return the first ``num_slots`` slots of a layer, making those that do not exist yet."""
        slots = self.slots[layer]
        while len(slots) < num_slots:
            slots.append(Slot(self._store.layers[layer], self._device))
        return slots[:num_slots]
