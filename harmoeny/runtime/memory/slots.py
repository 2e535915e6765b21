"""Device memory for experts: slots of one expert each, which the systems of a rank use in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from harmoeny.runtime.device import Span
from harmoeny.runtime.memory.experts import ExpertStore, LayerExperts, halves_of
from harmoeny.runtime.memory.residents import EMPTY


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
        layer: the slots of the layer.
        index: which of them it is.
        expert_id: the expert that the slot holds, or will hold after :attr:`transfer`; ``EMPTY`` for none.
        weights: its weights by name, each ``[...]`` without the layer's first dimension; valid after :attr:`transfer`.
        transfer: the copy into the slot that nobody has waited for yet.
    """

    layer: LayerSlots
    index: int
    expert_id: int = EMPTY
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    transfer: Transfer | None = None

    @property
    def expert_bytes(self) -> int:
        """Size of the slot in bytes."""
        return self.layer.experts.expert_bytes

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The slot's own memory by name: views of the layer's."""
        return {name: w[self.index] for name, w in self.layer.weights.items()}

    def fill(self, source: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copy an expert's weights into the slot."""
        buffers = self.buffers
        for name, buffer in buffers.items():
            buffer.copy_(source[name], non_blocking=non_blocking)
        self.weights = buffers

    def fill_rest(self, source: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copy the second halves of an expert's weights into the slot; ``source``: the whole weights."""
        for name, buffer in self.buffers.items():
            halves_of(buffer)[1].copy_(halves_of(source[name])[1], non_blocking=non_blocking)

    def fill_first(self, source: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copy the first halves of an expert's weights into the slot; ``source``: those that have any rows."""
        buffers = self.buffers
        for name, first in source.items():
            halves_of(buffers[name])[0].copy_(first, non_blocking=non_blocking)
        self.weights = buffers

    def refer(self, source: Mapping[str, Tensor]) -> None:
        """Let the slot hold weights without a copy, where device memory is host memory."""
        self.weights = source


class LayerSlots:
    """The slots of one layer on one rank: one tensor per weight name, so that one call can compute with all of them.

    Attributes:
        experts: the layer's experts, of which every slot holds one.
        device: where the slots are.
        slots: the slots.
    """

    def __init__(self, experts: LayerExperts, device: torch.device) -> None:
        self.experts = experts
        self.device = device
        self.slots: list[Slot] = []
        self._weights: dict[str, Tensor] = {}
        self._allocating = Lock()

    @property
    def weights(self) -> dict[str, Tensor]:
        """``[num_slots, ...]`` by name, allocated at the first use at the latest."""
        self.allocate()
        return self._weights

    def allocate(self) -> None:
        """Get the memory of all slots, so that none is asked for while anything is timed."""
        if self._weights:
            return
        # A copy thread may ask for it while its computing thread does. What inference mode makes is written only in it.
        with self._allocating, torch.inference_mode(False):
            self._weights = self._weights or {
                name: torch.empty((len(self.slots), *w.shape[1:]), dtype=w.dtype, device=self.device)
                for name, w in self.experts.weights.items()
            }

    def reserve(self, num_slots: int) -> Sequence[Slot]:
        """Return the first ``num_slots`` slots, making those that do not exist yet.

        Where the memory was allocated for fewer, all slots are empty afterwards; no copy may be under way then.
        """
        if num_slots > len(self.slots) and self._weights:
            self._weights = {}
            for slot in self.slots:
                slot.expert_id, slot.weights, slot.transfer = EMPTY, {}, None
        self.slots += [Slot(self, index) for index in range(len(self.slots), num_slots)]
        return self.slots[:num_slots]

    def refer_all(self) -> None:
        """Let slot i hold expert i without a copy, where device memory is host memory and there is a slot for each."""
        self._weights = self.experts.weights
        for slot in self.slots:
            slot.refer(slot.buffers)
            slot.expert_id = slot.index


class SlotPool:
    """The slots of a rank, by layer; one pool serves all its systems, since they take turns.

    Attributes:
        layers: per layer; as many slots as the system with the most needs.
    """

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self.layers = [LayerSlots(experts, device) for experts in store.layers]
