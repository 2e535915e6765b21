"""Shared experts of Transformers' MoE layers, taken from the model's own code and handed to the runtime.

A shared expert k times as wide as the routed ones is k experts of their width, whose outputs add up: its matrices are
cut along the inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harmoeny.models.base import TOLERANCE, MoEContext
from harmoeny.runtime.memory.experts import LayerExperts, gated_mlp, swiglu

#: How layers call them, and what weights their output by a sigmoid, where there is such a thing.
_NAMES = ("shared_experts", "shared_expert")
_GATE = "shared_expert_gate"
_MATRICES = ("gate_proj", "up_proj", "down_proj")


class SharedExperts:
    """One layer's shared experts: computed by the runtime, or, as the reference, by the model's own code.

    Attributes:
        module: the model's module, which gives zeros from then on, unless the dense model is asked for.
    """

    def __init__(self, module: nn.Module, gate: nn.Module | None, width: int, context: MoEContext) -> None:
        """Take the weights out of the module.

        Args:
            module: has the three matrices of a gated expert.
            gate: its output's sigmoid, ``[num_tokens, 1]``, weights that of the expert; None: nothing does.
            width: of a routed expert between its matrices.
            context: shared by the model's MoE layers.
        """
        self.module, self._gate, self._width, self._context = module, gate, width, context
        self._own: Callable[[nn.Module, Tensor], Tensor] = type(module).forward

    def add_to(self, routed: LayerExperts) -> LayerExperts:
        """Return a layer's experts with the shared ones behind them; they are no parameters of the module afterwards.

        Args:
            routed: the layer's experts.
        """
        gate, up, down = (_linear(self.module, name).weight.detach() for name in _MATRICES)
        num_shared = gate.shape[0] // self._width
        first = torch.cat([part.view(num_shared, self._width, -1) for part in (gate, up)], dim=1)
        last = down.view(-1, num_shared, self._width).transpose(0, 1)
        weights = {
            "gate_up": torch.cat([routed.weights["gate_up"], first]),
            "down": torch.cat([routed.weights["down"], last]),
        }
        for name in _MATRICES:
            linear = _linear(self.module, name)
            placeholder = torch.empty_like(linear.weight, device="meta")
            del linear._parameters["weight"]
            linear.__dict__["weight"] = placeholder
        self.module.__dict__["forward"] = self._forward
        self._experts = LayerExperts(weights, routed.function, routed.hidden_size, num_shared)
        return self._experts

    def check(self, device: torch.device) -> None:
        """Compare the sum of the experts with the model's own code on a few rows.

        Args:
            device: where the model's other parameters are.

        Raises:
            ValueError: the two differ.
        """
        experts = self._experts
        dtype = experts.weights["down"].dtype
        rows = torch.randn(4, experts.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        total = torch.zeros_like(rows)
        with torch.no_grad():
            wanted = self._compute(rows)
            for expert_id in range(experts.num_routed, experts.num_experts):
                part = torch.empty_like(rows)
                experts.function({n: w.to(device) for n, w in experts.expert(expert_id).items()}, rows, part)
                total += part
        error, scale = float((total - wanted).abs().max()), float(wanted.abs().max())
        if not error <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * scale:
            raise ValueError(
                f"model.route_shared: true, must be false for this model: {type(self.module).__name__} is no SwiGLU "
                f"(it differs by {error:.3g} at a scale of {scale:.3g})"
            )

    def weights_of(self, rows: Tensor) -> Tensor | None:
        """Return ``[num_tokens]``, the weights of the shared experts' outputs for ``[num_tokens, hidden_size]``."""
        return None if self._gate is None else torch.sigmoid(self._gate(rows)).squeeze(-1)

    def restore(self, device: torch.device) -> None:
        """Give the weights back to the model as parameters on ``device``."""
        for name, weight in self._matrices(device).items():
            linear = _linear(self.module, name)
            linear.__dict__.pop("weight")
            linear.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))
        del self.module.__dict__["forward"]

    def _forward(self, hidden: Tensor) -> Tensor:
        """Compute the dense model's part; with an engine it is in the output of the layer's experts already."""
        return self._compute(hidden) if self._context.dense else hidden.new_zeros(()).expand_as(hidden)

    def _compute(self, hidden: Tensor) -> Tensor:
        linears = {name: _linear(self.module, name) for name in _MATRICES}
        placeholders = {name: linear.__dict__["weight"] for name, linear in linears.items()}
        for name, weight in self._matrices(hidden.device).items():
            linears[name].__dict__["weight"] = weight
        try:
            return self._own(self.module, hidden)
        finally:
            for name, linear in linears.items():
                linear.__dict__["weight"] = placeholders[name]

    def _matrices(self, device: torch.device) -> dict[str, Tensor]:
        """Return the module's three matrices, put together again."""
        experts = self._experts
        first, last = (experts.weights[name][experts.num_routed :].to(device) for name in ("gate_up", "down"))
        gate, up = (part.reshape(-1, first.shape[-1]) for part in torch.split(first, self._width, dim=1))
        return dict(zip(_MATRICES, (gate, up, last.transpose(0, 1).reshape(last.shape[1], -1)), strict=True))


def find_shared(module: nn.Module, path: str, routed: LayerExperts, context: MoEContext) -> SharedExperts:
    """Return the shared experts beside a layer's experts.

    Args:
        module: the model.
        path: of the layer's experts in it.
        routed: those experts.
        context: shared by the model's MoE layers.

    Raises:
        ValueError: there are none, or they are not what the runtime can cut into experts of the routed ones' width.
    """
    beside: dict[str, Any] = dict(module.get_submodule(path.rpartition(".")[0]).named_children())
    shared = next((beside[name] for name in _NAMES if name in beside), None)
    refused = f"model.route_shared: true, must be false for this model: {path.rpartition('.')[0]}"
    if shared is None:
        raise ValueError(f"{refused} has no shared expert that is called {' or '.join(_NAMES)}")
    linears: list[Any] = [getattr(shared, name, None) for name in _MATRICES]
    plain = all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears)
    if not plain or routed.function != gated_mlp(swiglu) or "gate_up_bias" in routed.weights:
        raise ValueError(f"{refused} has experts that are no SwiGLU of three plain matrices")
    width, routed_width = linears[0].out_features, routed.weights["down"].shape[-1]
    if width % routed_width or linears[0].in_features != routed.hidden_size:
        raise ValueError(f"{refused} has a shared expert of width {width}, no multiple of {routed_width}")
    return SharedExperts(shared, beside.get(_GATE), routed_width, context)


def _linear(module: nn.Module, name: str) -> Any:
    return getattr(module, name)
