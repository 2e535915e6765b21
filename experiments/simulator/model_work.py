"""What a model computes outside its experts: every operator of one forward pass, traced without weights or data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from experiments.routers.base import FloatArray
from harmoeny.models.base import ModelConfig, MoEModel

_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)


@dataclass(frozen=True)
class ModelWork:
    """One rank's work for one batch.

    Attributes:
        dense: per MoE layer the operators before it, and at the end those after the last layer; float64
            ``[num_operators, 2]``: floating-point operations and bytes read and written, each operator on its own.
        route: per MoE layer the operators of its router, likewise.
        layer_tokens: tokens per MoE layer.
        num_experts: experts per MoE layer, without shared ones.
        top_k: experts per token, without shared ones.
        hidden_size: width of a token.
        inner_width: values that an expert keeps per token between its matrices.
        element_bytes: size of one value.
        expert_bytes: size of one expert.
        flops_per_token: floating-point operations of one expert for one token.
        dense_bytes: size of all weights outside the experts.
        peak_bytes: most bytes that one operator outside the experts reads and writes.
        stacks: per MoE layer, the stack that it belongs to.
        scope: as in the records.
        num_shared: shared experts per MoE layer that the runtime executes.
    """

    dense: Sequence[FloatArray]
    route: Sequence[FloatArray]
    layer_tokens: Sequence[int]
    num_experts: int
    top_k: int
    hidden_size: int
    inner_width: int
    element_bytes: int
    expert_bytes: int
    flops_per_token: int
    dense_bytes: int
    peak_bytes: float
    stacks: Sequence[int]
    scope: str
    num_shared: int = 0

    @property
    def all_experts(self) -> int:
        """Experts per MoE layer that the runtime executes, shared ones too."""
        return self.num_experts + self.num_shared

    @property
    def row_bytes(self) -> int:
        """Size of one token's hidden state."""
        return self.hidden_size * self.element_bytes


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a MoE layer in BF16.

    Attributes:
        num_experts: its experts.
        hidden_size: width of a token.
        intermediate_size: width of an expert.
        top_k: experts per token.
        gated: whether the experts have a third matrix.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int = 1
    gated: bool = True

    def work(self, num_tokens: int, num_layers: int = 1) -> ModelWork:
        """Return what a rank with so many tokens computes in layers of this shape and nothing beside them."""
        nothing = np.zeros((0, 2))
        values = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        return ModelWork(
            dense=[nothing] * (num_layers + 1),
            route=[nothing] * num_layers,
            layer_tokens=[num_tokens] * num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            inner_width=(2 if self.gated else 1) * self.intermediate_size,
            element_bytes=2,
            expert_bytes=2 * values,
            flops_per_token=2 * values,
            dense_bytes=0,
            peak_bytes=0.0,
            stacks=[0] * num_layers,
            scope="layer",
        )


class TracedModel:
    """A model's work by batch size: it is built once, and traced once for every size.

    Args:
        config: the model.
        seq_len: tokens per sequence.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        self._model = config.build(0, "meta")
        self._seq_len = seq_len
        self._work: dict[int, ModelWork] = {}
        self._decode_work: dict[tuple[int, int], ModelWork] = {}

    def work(self, batch_size: int) -> ModelWork:
        """Return what the model computes for ``batch_size`` sequences."""
        if batch_size not in self._work:
            input_ids = torch.empty(batch_size, self._seq_len, dtype=torch.int64, device="meta")
            layer_tokens = self._model.layer_tokens(batch_size, self._seq_len)
            self._work[batch_size] = _trace(self._model, layer_tokens, lambda: self._model.forward(input_ids))
        return self._work[batch_size]

    def decode_work(self, batch_size: int, num_steps: int) -> ModelWork:
        """Return what the model computes for one more token of ``batch_size`` sequences, in the middle of the steps."""
        key = (batch_size, num_steps)
        if key not in self._decode_work:
            self._decode_work[key] = self._trace_step(batch_size, self._seq_len + num_steps // 2)
        return self._decode_work[key]

    def _trace_step(self, batch_size: int, length: int) -> ModelWork:
        input_ids = torch.empty(batch_size, length, dtype=torch.int64, device="meta")
        tokens = input_ids[:, -1]
        unread = _Counter()
        self._model.connect(_NoExperts(unread))  # type: ignore[arg-type]
        with torch.no_grad(), unread:
            _, cache = self._model.prefill(input_ids)
        layer_tokens = [batch_size] * len(self._model.experts)
        return _trace(self._model, layer_tokens, lambda: self._model.decode(tokens, cache))


def _trace(model: MoEModel, layer_tokens: Sequence[int], forward: Callable[[], object]) -> ModelWork:
    """Trace one forward pass of a model on PyTorch's ``meta`` device, where tensors have shapes only.

    Operators are taken as eager PyTorch executes them: one after the other, each reading its inputs and writing its
    output. Views cost nothing.
    """
    counter = _Counter()
    model.connect(_NoExperts(counter))  # type: ignore[arg-type]
    with torch.no_grad(), counter:
        forward()
    segments = [*counter.segments, counter.operators]
    experts = model.experts[0]
    sample = next(w for w in experts.weights.values() if w.ndim == 3)
    table = [np.array(s, dtype=np.float64).reshape(-1, 2) for s in segments]
    return ModelWork(
        dense=table[0::2],
        route=table[1::2],
        layer_tokens=layer_tokens,
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=experts.hidden_size,
        inner_width=experts.inner_width,
        element_bytes=sample.element_size(),
        expert_bytes=experts.expert_bytes,
        flops_per_token=experts.flops_per_token,
        dense_bytes=_dense_bytes(model),
        peak_bytes=max((float(t[:, 1].max()) for t in table if len(t)), default=0.0),
        stacks=model.stacks,
        scope=model.scope,
        num_shared=experts.num_shared,
    )


def _dense_bytes(model: MoEModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.module.parameters())


class _NoExperts:
    """Takes the place of ``ExpertParallel``: notes where MoE layers begin and returns tokens unchanged."""

    def __init__(self, counter: _Counter) -> None:
        self.recorder = SimpleNamespace(begin_layer=lambda _: counter.cut())
        self.comm = SimpleNamespace(device=torch.device("meta"))
        self._counter = counter

    def forward(self, layer: int, hidden_TH: Tensor, *_: Tensor | None) -> Tensor:  # noqa: ARG002, N803
        self._counter.cut()
        return hidden_TH


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes floating-point operations and bytes of every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[float, float]] = []
        self.segments: list[list[tuple[float, float]]] = []
        self._seen: dict[Hashable, tuple[_Sizes, tuple[float, float]]] = {}

    def cut(self) -> None:
        """End a segment."""
        self.segments.append(self.operators)
        self.operators = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Models ask whether all of a mask is plain, to leave it out; without data the answer is yes.
            return args[0].dtype == torch.bool
        if _is_view(func):
            return func(*args, **(kwargs or {}))
        # Layers do the same over and over, and PyTorch works out sizes in Python, operator by operator.
        key = (func, _key(args), _key(kwargs or {}))
        if key in self._seen:
            sizes, operator = self._seen[key]
            self.operators.append(operator)
            return torch.empty_strided(*sizes[:2], dtype=sizes[2], device="meta")
        out = func(*args, **(kwargs or {}))
        flops_of: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        flops = flops_of(*args, **(kwargs or {}), out_val=out) if flops_of is not None else 0
        read = _bytes((args, kwargs or {}))
        if func._overloadpacket in _LOOKUPS:
            read += _bytes(out) - _bytes(args[0])  # of the table, only the rows that are asked for
        operator = float(flops), float(read + _bytes(out))
        self.operators.append(operator)
        if isinstance(out, Tensor) and _is_new(func):
            self._seen[key] = (tuple(out.shape), out.stride(), out.dtype), operator
        return out


#: Shape, strides and type of a tensor.
_Sizes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _key(value: Any) -> Hashable:
    """Return all that an operator's result and cost depend on."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device, value.untyped_storage().nbytes()
    if isinstance(value, Mapping):
        return tuple((name, _key(v)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value


@cache
def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


@cache
def _is_new(func: Any) -> bool:
    """Tell whether an operator changes none of its inputs and returns none."""
    return not func._schema.is_mutable and all(r.alias_info is None for r in func._schema.returns)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        # An expanded tensor has fewer bytes than elements.
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(v) for v in value)
    return 0
