"""Expert weights: how one layer stores and applies them, and the store that holds all layers in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harmoeny.runtime.memory import pinning
from harmoeny.runtime.memory.pinning import pages_of, with_own_pages

#: Applies one expert: (weights by name, rows ``[n, H]``, output ``[n, H]`` to write).
ExpertFunction = Callable[[Mapping[str, Tensor], Tensor, Tensor], None]


def halves_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the first half of the rows of one expert's weight, which may be none, and of the rest."""
    rows = weight.reshape(-1) if weight.ndim == 0 else weight
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


@dataclass(frozen=True)
class LayerExperts:
    """All experts of one MoE layer.

    Attributes:
        weights: tensors ``[num_experts, ...]`` by name; one expert is one slice of each.
        function: how an expert is applied.
        hidden_size: width of a token.
        num_shared: the last experts, so many, are shared ones, to which every token goes.
    """

    weights: dict[str, Tensor]
    function: ExpertFunction
    hidden_size: int
    num_shared: int = 0

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer, shared ones too."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def num_routed(self) -> int:
        """Number of experts that a router chooses from."""
        return self.num_experts - self.num_shared

    @property
    def routed(self) -> dict[str, Tensor]:
        """The weights of the routed experts, by name."""
        return {name: w[: self.num_routed] for name, w in self.weights.items()}

    @cached_property
    def expert_bytes(self) -> int:
        """Size of one expert's weights in bytes."""
        return sum(w[0].numel() * w.element_size() for w in self.weights.values())

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's matrix products."""
        return sum(2 * w[0].numel() for w in self.weights.values() if w.ndim == 3)

    @property
    def inner_width(self) -> int:
        """Values that an expert keeps per token between its matrices: both halves, where it is gated."""
        sample = next(w for w in self.weights.values() if w.ndim == 3)
        return sample[0].numel() // self.hidden_size

    def expert(self, expert_id: int) -> dict[str, Tensor]:
        """Return views of one expert's weights."""
        return {name: w[expert_id] for name, w in self.weights.items()}


class ExpertStore:
    """Every expert of every MoE layer in host memory: one copy for all systems of a job.

    Attributes:
        layers: the layers in order of execution.
    """

    def __init__(self, layers: Sequence[LayerExperts], *, pin: bool = False) -> None:
        """Take the layers' weights as they are.

        Args:
            layers: the layers in order of execution.
            pin: lock the weights in memory until :meth:`close`, so that CUDA can copy from them beside its computation.
                They are locked in place, but for small ones: they may be shared between ranks, and a pinned copy would
                be one per rank.

        Raises:
            RuntimeError: CUDA refuses.
        """
        self.layers = list(layers)
        pages: list[pinning.Pages] = []
        if pin:
            self.layers = [
                replace(layer, weights={name: with_own_pages(w) for name, w in layer.weights.items()})
                for layer in layers
            ]
            pages = pages_of(w for layer in self.layers for w in layer.weights.values())
        pins = pinning.PINS
        pins.add(pages)
        # Whoever drops a store without closing it, as by an error, must not leave memory locked that is given away.
        self._unpin = weakref.finalize(self, pins.remove, pages)
        self._unpin.atexit = False  # the end of the process does it, when CUDA may be gone already

    def close(self) -> None:
        """Unlock the weights; no copy may be under way."""
        self._unpin()

    @property
    def nbytes(self) -> int:
        """Size of all expert weights in bytes."""
        return sum(layer.expert_bytes * layer.num_experts for layer in self.layers)


@dataclass(frozen=True)
class ExpertMLP:
    """An expert of two linear maps, ``norm(down(between(first(x))))``; it is an :data:`ExpertFunction`.

    Attributes:
        first: name of the first matrix; the second is ``down``, and a bias is named after its matrix: ``down_bias``.
        between: from ``[n, rows of the first matrix]`` to ``[n, columns of the second]``.
        transposed: the matrices are stored as ``[in, out]`` and not as ``[out, in]``.
        norm: is applied to the output, row by row, before it is weighted; None: nothing is.
    """

    first: str
    between: Callable[[Tensor], Tensor]
    transposed: bool = False
    norm: Callable[[Tensor], Tensor] | None = None

    def __call__(self, weights: Mapping[str, Tensor], rows: Tensor, out: Tensor) -> None:
        """Apply one expert."""
        hidden = self.between(self._linear(weights, self.first, rows))
        self._linear(weights, "down", hidden, out)
        if self.norm is not None:
            out.copy_(self.norm(out))

    def compose(self, rows: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Return the output of ``rows``, with ``linear`` computing the linear map of a name on rows."""
        output = linear("down", self.between(linear(self.first, rows)))
        return output if self.norm is None else self.norm(output)

    def _linear(self, weights: Mapping[str, Tensor], name: str, rows: Tensor, out: Tensor | None = None) -> Tensor:
        matrix = weights[name] if self.transposed else weights[name].t()
        bias = weights.get(f"{name}_bias")
        return torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)


def mlp(
    activation: Callable[[Tensor], Tensor],
    *,
    transposed: bool = False,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> ExpertMLP:
    """Return the function of a two-matrix expert, ``down(activation(up(x)))``, as Switch Transformers have it.

    The weights are ``up`` ``[intermediate_size, hidden_size]`` and ``down`` ``[hidden_size, intermediate_size]``, with
    the optional biases ``up_bias`` ``[intermediate_size]`` and ``down_bias`` ``[hidden_size]``.

    Args:
        activation: from ``[n, intermediate_size]`` to the same shape.
        transposed: the matrices are stored as ``[in, out]``.
        norm: is applied to the output, row by row, before it is weighted; None: nothing is.
    """
    return ExpertMLP("up", activation, transposed, norm)


def gated_mlp(
    gate: Callable[[Tensor], Tensor], *, transposed: bool = False, norm: Callable[[Tensor], Tensor] | None = None
) -> ExpertMLP:
    """Return the function of a gated expert, ``down(gate(gate_up(x)))``.

    The weights are ``gate_up`` ``[2 * intermediate_size, hidden_size]`` and ``down`` ``[hidden_size,
    intermediate_size]``, or the transposes of both as GPT-OSS stores them, with the optional biases ``gate_up_bias``
    and ``down_bias``.

    Args:
        gate: from ``[n, 2 * intermediate_size]`` to ``[n, intermediate_size]``: splits into gate and up part, in halves
            or interleaved as the model does, and combines them.
        transposed: the matrices are stored as ``[in, out]``.
        norm: is applied to the output, row by row, before it is weighted; None: nothing is.
    """
    return ExpertMLP("gate_up", gate, transposed, norm)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
