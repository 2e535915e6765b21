"""Transformers' experts interface: finds a model's experts, describes them, and has the runtime execute them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harmoeny.dependencies import require
from harmoeny.models.base import TOLERANCE, AdaptedModule, MoEContext
from harmoeny.models.kit.modules import device_of
from harmoeny.models.kit.shared_experts import SharedExperts, find_shared
from harmoeny.runtime.memory.experts import ExpertMLP, LayerExperts, gated_mlp, mlp, swiglu

#: Our name among Transformers' implementations of experts.
IMPLEMENTATION = "harmoeny"

#: Computes a layer's experts: (hidden ``[..., H]``, expert ids ``[num_tokens, top_k]``, routing weights, the same).
ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]

_CALL = "_harmoeny_call"
#: Our names of an expert's tensors, and the interface's.
_NAMES = {
    "gate_up": "gate_up_proj",
    "up": "up_proj",
    "down": "down_proj",
    "gate_up_bias": "gate_up_proj_bias",
    "up_bias": "up_proj_bias",
    "down_bias": "down_proj_bias",
}
#: How models call what chooses the experts.
_ROUTERS = ("gate", "router")
_PROBE_TOKENS = 4


def register_implementation(on_unbound: Callable[[nn.Module], object] | None = None) -> None:
    """Make ``harmoeny`` an implementation of experts that Transformers knows.

    Args:
        on_unbound: called with experts that are run without having been bound; it has to :func:`bind` them. None keeps
            what was registered before, which may be nothing.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        require("transformers", "it must have integrations.moe.ALL_EXPERTS_FUNCTIONS", holds=False)

    if on_unbound is None and IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
        return

    def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not is_bound(module) and on_unbound is not None:
            on_unbound(module)
        call: ExpertsCall = module.__dict__[_CALL]
        return call(hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module is a layer's experts, declared through the interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and hasattr(module, "has_bias")


def is_bound(module: nn.Module) -> bool:
    """Tell whether a layer's experts are computed by something that :func:`bind` gave them."""
    return _CALL in module.__dict__


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts in a model by path, in the order of its layers."""
    return {path: module for path, module in model.named_modules() if is_experts(module)}


def layer_experts(experts: nn.Module) -> LayerExperts:
    """Describe a layer's experts; the tensors are the module's own, not copies.

    Raises:
        ValueError: its weights are not what the interface declares, as with quantised ones.
    """
    # Releases of Transformers before these flags had only experts with a gate, and none with a norm.
    gated = bool(getattr(experts, "has_gate", True))
    up = "gate_up" if gated else "up"
    names = [up, "down", *((f"{up}_bias", "down_bias") if experts.has_bias else ())]
    weights = {}
    for name in names:
        tensor = experts._parameters.get(_NAMES[name])
        if tensor is None or not tensor.is_floating_point() or tensor.shape[0] != experts.num_experts:
            raise ValueError(
                f"{type(experts).__name__}.{_NAMES[name]}: must be one floating-point tensor with all experts' weights"
            )
        weights[name] = tensor.detach()
    hidden_size = weights[up].shape[1 if experts.is_transposed else 2]
    return LayerExperts(weights, _function(experts, gated=gated), hidden_size)


def _function(experts: Any, *, gated: bool) -> ExpertMLP:
    transposed = bool(experts.is_transposed)
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    if gated:
        gate = swiglu if _is_swiglu(experts) else experts._apply_gate
        return gated_mlp(gate, transposed=transposed, norm=norm)
    return mlp(experts.act_fn, transposed=transposed, norm=norm)


def _is_swiglu(experts: Any) -> bool:
    """Tell whether the gate is the interface's own, with SiLU, which kernels know by that name."""
    from transformers import activations
    from transformers.integrations import moe

    own = getattr(type(experts), "_apply_gate", None) is getattr(moe, "_default_apply_gate", _NAMES)
    return own and isinstance(experts.act_fn, (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU)))


def bind(experts: Any, weights: Mapping[str, Tensor], call: ExpertsCall) -> None:
    """Let ``call`` compute a layer's experts, whose weights are no parameters of the model from then on.

    Args:
        experts: the module.
        weights: its weights, as :func:`layer_experts` names them.
        call: what computes them under the implementation ``harmoeny``.
    """
    for name, tensor in weights.items():
        experts._parameters.pop(_NAMES[name], None)
        # Models may ask for the type or shape of their experts' weights.
        setattr(experts, _NAMES[name], torch.empty_like(tensor, device="meta"))
    experts.__dict__[_CALL] = call
    has_choice = hasattr(experts.config, "_experts_implementation_internal")
    require("transformers", "configurations must have _experts_implementation_internal", holds=has_choice)
    # What set_experts_implementation of a model sets too, but on the configuration that these experts read.
    experts.config._experts_implementation_internal = IMPLEMENTATION


def unbind(experts: Any, weights: Mapping[str, Tensor], implementation: str | None) -> None:
    """Undo :func:`bind`: the weights become parameters again, and ``implementation`` computes the experts."""
    experts.config._experts_implementation_internal = implementation
    experts.__dict__.pop(_CALL, None)
    for name, tensor in weights.items():
        experts.__dict__.pop(_NAMES[name], None)
        experts.register_parameter(_NAMES[name], nn.Parameter(tensor, requires_grad=False))


def forward_dense(
    experts: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor
) -> Tensor:
    """Compute bound experts with the model's own code.

    Args:
        experts: the module.
        weights: its weights, as :func:`layer_experts` names them.
        hidden: ``[num_tokens, hidden_size]``.
        expert_ids: int64 ``[num_tokens, top_k]``; a negative id leaves the assignment out.
        routing_weights: ``[num_tokens, top_k]``.
    """
    placeholders = {name: experts.__dict__[_NAMES[name]] for name in weights}
    for name, tensor in weights.items():
        experts.__dict__[_NAMES[name]] = tensor.to(hidden.device)
    try:
        own = inspect.unwrap(type(experts).forward)
        # Not every model's code knows an id for "none", but all multiply by the routing weight.
        output: Tensor = own(experts, hidden, expert_ids.clamp(min=0), routing_weights.masked_fill(expert_ids < 0, 0))
    finally:
        for name, placeholder in placeholders.items():
            experts.__dict__[_NAMES[name]] = placeholder
    return output


def check_function(experts: nn.Module, layer: LayerExperts, device: torch.device) -> None:
    """Compare one bound expert with the model's own code on a few rows.

    The interface cannot say everything about an expert: a class whose code does more than it declares is refused here.

    Args:
        experts: the module.
        layer: its weights and how we apply them.
        device: where the module's other parameters are.

    Raises:
        ValueError: the two differ.
    """
    expert_id = layer.num_routed - 1
    weights = {name: w.to(device) for name, w in layer.expert(expert_id).items()}
    dtype = weights["down"].dtype
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_TOKENS, layer.hidden_size, generator=generator).to(device, dtype)
    expert_ids = torch.full((_PROBE_TOKENS, 1), expert_id, device=device)
    with torch.no_grad():
        wanted = forward_dense(experts, layer.routed, rows, expert_ids, torch.ones_like(expert_ids, dtype=dtype))
        output = torch.empty_like(rows)
        layer.function(weights, rows, output)
    error, scale = (output - wanted).abs().max(), wanted.abs().max()
    if not error <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * scale:
        raise ValueError(
            f"{type(experts).__name__}: its own code computes something else than it declares to Transformers' experts "
            f"interface (an expert differs by {float(error):.3g} at a scale of {float(scale):.3g})"
        )


class ExpertsBlock:
    """One layer's experts, computed expert-parallel or, as the reference, by the model's own code."""

    def __init__(
        self, experts: Any, described: LayerExperts, layer: int, context: MoEContext, shared: SharedExperts | None
    ) -> None:
        self.module: nn.Module = experts
        self.layer = layer
        self.context = context
        self.experts = described if shared is None else shared.add_to(described)
        self.shared = shared
        self._opened = False
        before: str | None = getattr(experts.config, "_experts_implementation", None)
        self._implementation = "eager" if before == IMPLEMENTATION else before
        register_implementation()
        bind(experts, self.experts.routed, self)

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts' part of a layer; all ranks call it together, each with its own tokens.

        A pinned choice takes the place of the model's: the k-th expert pinned for a token gets the weight of its own
        k-th expert, so that the weights keep the scale of the model's gating, whatever that is.

        Args:
            hidden: ``[..., hidden_size]``.
            top_k_index: integer ``[num_tokens, top_k]``; an id that is no expert's leaves the assignment out.
            top_k_weights: ``[num_tokens, top_k]``.

        Raises:
            RuntimeError: gradients are wanted.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        none = (top_k_index < 0) | (top_k_index >= self.experts.num_routed)
        expert_ids = self.context.tape.choose(self.layer, top_k_index.long().masked_fill(none, -1))
        if self.context.dense:
            expert_ids = self.context.tape.keep(self.layer, expert_ids)
            output = forward_dense(self.module, self.experts.routed, rows, expert_ids, top_k_weights)
            return output.view_as(hidden)
        engine = self.context.engine
        assert engine is not None, "bound experts have an engine"
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise RuntimeError(
                "experts_implementation='harmoeny' is for inference: call the model under torch.inference_mode() or "
                "torch.no_grad()"
            )
        if not self._opened:
            engine.recorder.begin_layer(self.layer)
        self._opened = False
        shared_weights = None if self.shared is None else self.shared.weights_of(rows)
        return engine.forward(self.layer, rows, expert_ids, top_k_weights, shared_weights).view_as(hidden)

    def require_bound(self, *_: object) -> None:
        """Refuse another implementation: it would compute with weights that the model does not hold any more.

        Raises:
            RuntimeError: the configuration that these experts read names another implementation than ours.
        """
        config: Any = self.module.config
        named = config._experts_implementation
        if named != IMPLEMENTATION:
            raise RuntimeError(
                f"experts_implementation: {named!r}, must stay {IMPLEMENTATION!r} while a session is open; close the "
                "session first, and give a model that is compared with this one a configuration of its own"
            )

    def begin(self, *_: object) -> None:
        """Open the layer in the recorder; called when its router begins."""
        if self.context.engine is not None and not self.context.dense:
            self.context.engine.recorder.begin_layer(self.layer)
            self._opened = True

    def restore(self, device: torch.device) -> None:
        """Give the weights back to the model as parameters on ``device``."""
        unbind(self.module, {name: w.to(device) for name, w in self.experts.routed.items()}, self._implementation)
        if self.shared is not None:
            self.shared.restore(device)


class AdaptedExperts(AdaptedModule):
    """A module with experts behind the interface: a model, a part of one, or a layer's experts alone."""

    def __init__(self, module: nn.Module, *, route_shared: bool = False) -> None:
        """Take the experts' weights out of the module.

        Args:
            module: the module.
            route_shared: take its shared experts, too.

        Raises:
            ValueError: the module has no experts behind the interface, or their weights are not what it declares.
        """
        found = find_experts(module)
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no layer whose experts use Transformers' experts interface; "
                "docs/models.md lists the models that do"
            )
        context, device = MoEContext(), device_of(module)
        described = [layer_experts(experts) for experts in found.values()]  # all, before any is changed
        paths = zip(found, described, strict=True)
        shared = [find_shared(module, path, layer, context) if route_shared else None for path, layer in paths]
        self.blocks = [
            ExpertsBlock(experts, layer, index, context, beside)
            for index, (experts, layer, beside) in enumerate(zip(found.values(), described, shared, strict=True))
        ]
        super().__init__(module, [block.experts for block in self.blocks], context, device)
        self._hooks = []
        for (path, experts), block in zip(found.items(), self.blocks, strict=True):
            self._hooks.append(experts.register_forward_pre_hook(block.require_bound))
            router = _router(module, path)
            if router is not None:
                self._hooks.append(router.register_forward_pre_hook(block.begin))

    @property
    def bare(self) -> Sequence[nn.Module]:
        """The layers' experts."""
        return [block.module for block in self.blocks]

    def check(self) -> None:
        """Check one layer of every kind; without weights, on the ``meta`` device, there is nothing to compare.

        Raises:
            ValueError: its code does more than the interface can say.
        """
        kinds = {type(block.module): block for block in reversed(self.blocks)}
        for block in kinds.values():
            if not any(w.is_meta for w in block.experts.weights.values()):
                check_function(block.module, block.experts, self.device)
                if block.shared is not None:
                    block.shared.check(self.device)

    def restore(self) -> None:
        """Give the weights back as parameters, on the device of the others."""
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            block.restore(self.device)


def _router(module: nn.Module, path: str) -> nn.Module | None:
    """Return what chooses the experts at ``path``: a module beside them."""
    if not path:
        return None
    beside = dict(module.get_submodule(path.rpartition(".")[0]).named_children())
    return next((beside[name] for name in _ROUTERS if name in beside), None)
