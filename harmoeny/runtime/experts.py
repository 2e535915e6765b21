"""Expert weights: how one layer stores and applies them, and the store that holds all layers in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Applies one expert: (weights by name, rows ``[n, H]``, output ``[n, H]`` to write).
ExpertFunction = Callable[[Mapping[str, Tensor], Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerExperts:
    """All experts of one MoE layer.

    Attributes:
        weights: tensors ``[num_experts, ...]`` by name; one expert is one slice of each.
        function: how an expert is applied.
    """

    weights: dict[str, Tensor]
    function: ExpertFunction

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's weights in bytes."""
        return sum(w[0].numel() * w.element_size() for w in self.weights.values())

    def expert(self, expert_id: int) -> dict[str, Tensor]:
        """Return views of one expert's weights."""
        return {name: w[expert_id] for name, w in self.weights.items()}


class ExpertStore:
    """Every expert of every MoE layer in host memory: one copy for all systems of a job, pinned for CUDA.

    Attributes:
        layers: the layers in order of execution.
    """

    def __init__(self, layers: Sequence[LayerExperts], *, pin: bool = False) -> None:
        self.layers = [
            LayerExperts({k: w.pin_memory() for k, w in layer.weights.items()}, layer.function) if pin else layer
            for layer in layers
        ]

    @property
    def nbytes(self) -> int:
        """Size of all expert weights in bytes."""
        return sum(layer.expert_bytes * layer.num_experts for layer in self.layers)


def mlp(activation: Callable[[Tensor], Tensor]) -> ExpertFunction:
    """Return the function of a two-matrix expert, ``down(activation(up(x)))``.

    The weights are ``up`` ``[intermediate_size, hidden_size]`` and ``down`` ``[hidden_size, intermediate_size]``.
    """

    def apply(weights: Mapping[str, Tensor], rows: Tensor, out: Tensor) -> None:
        hidden = activation(torch.mm(rows, weights["up"].t()))
        torch.mm(hidden, weights["down"].t(), out=out)

    return apply
