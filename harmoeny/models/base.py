"""What every adapted model offers: expert-parallel blocks, the untouched dense computation, and pinned routing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Largest absolute error of an output, relative to the largest absolute output of the reference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: Far beyond any model; who asks for more has mistyped, and would wait for tables that no memory holds.
_MOST_EXPERTS = 65_536


class RoutingTape:
    """The routing decisions of one batch: recorded from the model's routers, or pinned, the same for every system.

    A pinned router still computes its logits, so its cost is real; only the choice of experts is replaced. The routing
    weights are the router's own probabilities of the experts chosen, or, where the router is out of reach (see
    harmoeny/models/transformers.py), those of its own choice. Nothing is recorded before the first :meth:`pin`.

    Attributes:
        recorded: the routers' own choices since the last :meth:`pin`, int64 ``[num_tokens, top_k]`` per MoE layer.
    """

    def __init__(self) -> None:
        self._pinned: Sequence[Tensor] | None = None
        self._kept: Sequence[Tensor] | None = None
        self._recording = False
        self.recorded: list[Tensor] = []

    def pin(self, expert_ids: Sequence[Tensor] | None, kept: Sequence[Tensor] | None = None) -> None:
        """Fix the choice of the next forward pass.

        Args:
            expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer, negative where a token has no expert; None leaves
                the choice to the model's routers, which :attr:`recorded` then holds.
            kept: bool ``[num_tokens, top_k]`` per MoE layer, false where a system dropped the assignment after its
                routing weight was computed; None: nothing is dropped.
        """
        self._pinned = expert_ids
        self._kept = kept
        self._recording = expert_ids is None
        self.recorded = []

    def choose(self, layer: int, own_choice: Tensor) -> Tensor:
        """Return a layer's experts: what is pinned, else the router's own choice (int64 ``[num_tokens, top_k]``)."""
        if self._pinned is not None:
            return self._pinned[layer]
        if self._recording:
            self.recorded.append(own_choice)
        return own_choice

    def keep(self, layer: int, expert_ids: Tensor) -> Tensor:
        """Return a layer's choice with -1 where :meth:`pin` says that the assignment is dropped.

        Dense code asks for it once it has the routing weights, which are those of the whole choice.
        """
        return expert_ids if self._kept is None else torch.where(self._kept[layer], expert_ids, -1)


class MoEContext:
    """What the MoE blocks of one model share.

    Attributes:
        tape: routing of the current batch.
        engine: executes the layers; set once the store of experts exists.
        dense: compute the layers with the model's own code on this rank alone, as the reference.
    """

    def __init__(self) -> None:
        self.tape = RoutingTape()
        self.engine: ExpertParallel | None = None
        self.dense = False


class MoEBlock(nn.Module, ABC):
    """One MoE layer of a model, executed expert-parallel or, as the reference, by the model's own code."""

    def __init__(self, layer: int, context: MoEContext) -> None:
        super().__init__()
        self.layer = layer
        self.context = context

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer to ``[..., hidden_size]``."""
        if self.context.dense:
            return self.forward_dense(hidden)
        engine = self.context.engine
        if engine is None:
            raise RuntimeError("no engine connected: call MoEModel.connect first")
        engine.recorder.begin_layer(self.layer)
        expert_ids, routing_weights = self.route(hidden)
        output = engine.forward(self.layer, hidden.reshape(-1, hidden.shape[-1]), expert_ids, routing_weights)
        return output.view_as(hidden)

    @abstractmethod
    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert ids (int64) and routing weights, both ``[num_tokens, top_k]``, of ``[..., hidden_size]``."""

    @abstractmethod
    def forward_dense(self, hidden: Tensor) -> Tensor:
        """Apply the layer with the model's own code, all experts on this rank."""


class AdaptedModule:
    """A module of any origin whose MoE layers an engine executes, until they are restored.

    Attributes:
        module: the module.
        experts: the weights of its MoE layers, in order of execution; they are no parameters of the module.
        context: shared by its MoE layers.
        device: where the module computes.
    """

    def __init__(
        self, module: nn.Module, experts: Sequence[LayerExperts], context: MoEContext, device: torch.device
    ) -> None:
        self.module, self.experts = module, list(experts)
        self.context, self.device = context, device

    @property
    def bare(self) -> Sequence[nn.Module]:
        """The module's parts that lack their experts' weights until they are restored."""
        return ()

    def check(self) -> None:
        """Compare how we apply an expert with the model's own code, where that can differ; the weights must be there.

        Raises:
            ValueError: the two differ.
        """

    def restore(self) -> None:
        """Give the MoE layers and their weights back to the module; nothing to do where they never were its own."""


class MoEModel(ABC):
    """A model that the harness can run: what an adapted module lacks for that.

    Attributes:
        adapted: the module whose MoE layers an engine executes.
        module: the same module.
        context: shared by its MoE layers.
        experts: the weights of its MoE layers, in order of execution.
        top_k: experts per token.
        scope: ``model``, or ``layer`` where there is nothing but MoE layers.
    """

    scope: ClassVar[str] = "model"
    #: Whether :meth:`prefill` and :meth:`decode` work.
    decodes: ClassVar[bool] = False

    def __init__(self, adapted: AdaptedModule, top_k: int) -> None:
        self.adapted = adapted
        self.module = adapted.module
        self.context = adapted.context
        self.experts = adapted.experts
        self.top_k = top_k

    @property
    def stacks(self) -> list[int]:
        """Per MoE layer, the stack that it belongs to; all layers of a stack see the same tokens."""
        return [0] * len(self.experts)

    @property
    def num_experts(self) -> int:
        """Experts per MoE layer that its router chooses from."""
        return self.experts[0].num_routed

    def connect(self, engine: ExpertParallel) -> None:
        """Let ``engine`` execute the MoE layers and move everything but the experts to its device.

        Raises:
            ValueError: the experts' own code computes something else than we do.
        """
        self.context.engine = engine
        self.adapted.device = engine.comm.device
        self.module.to(engine.comm.device)
        self.adapted.check()

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the first output token's logits, or the stack's output.

        Args:
            input_ids: int64 ``[batch_size, seq_len]``.

        Returns:
            ``[batch_size, vocab_size]``, or ``[batch_size, seq_len, hidden_size]`` for ``scope`` ``layer``.
        """

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Compute the first output token's logits, and keep what :meth:`decode` needs of the prompt.

        Args:
            input_ids: int64 ``[batch_size, seq_len]``.

        Returns:
            Logits ``[batch_size, vocab_size]``, and the keys and values of the prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode phase")

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Compute the next token's logits, ``[batch_size, vocab_size]``.

        Args:
            tokens: int64 ``[batch_size]``, the present token of every sequence.
            cache: keys and values of all tokens before; updated.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode phase")

    @property
    def serves(self) -> bool:
        """Whether :meth:`decode_running` works."""
        return False

    def decode_running(self, tokens: Tensor, running: Any) -> Tensor:
        """Compute the next token's logits of sequences of different lengths, ``[batch_size, vocab_size]``.

        Args:
            tokens: int64 ``[batch_size]``, the present token of every sequence.
            running: keys and values of all tokens before (``kit/sequences.py``); updated.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode phase")

    @abstractmethod
    def layer_tokens(self, batch_size: int, seq_len: int) -> list[int]:
        """Return the number of tokens that reach every MoE layer in one forward pass."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer that comes with a model.

    Attributes:
        path: its ``tokenizer.json``.
        end_id: the token that ends a document.
    """

    path: Path
    end_id: int


@dataclass(kw_only=True)
class ModelConfig(ABC):
    """A way to build a model; a keyword-only dataclass whose fields are the options ``model.<field>``.

    Attributes:
        num_experts: experts per MoE layer, without shared ones.
        top_k: experts per token, without shared ones.
        vocab_size: tokens that the tokenizer may use.
        dtype: ``float32`` or ``bfloat16``.
    """

    name: ClassVar[str]
    description: ClassVar[str]

    num_experts: int = 8
    top_k: int = 1
    vocab_size: int = 8192
    dtype: str = "float32"

    def resolved(self) -> Self:
        """Return the configuration with what it leaves to the model's files filled in.

        Raises:
            ValueError: the files aren't there, or say something else.
        """
        return self

    @property
    def tokenizer(self) -> TokenizerFile | None:
        """The model's own tokenizer, if it brings one."""
        return None

    @property
    def num_shared(self) -> int:
        """Shared experts per MoE layer that the model hands to the runtime; none where its own code computes them."""
        return 0

    def validate(self) -> None:
        """Check the configuration before any worker starts.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype: {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if not 1 <= self.num_experts <= _MOST_EXPERTS:
            raise ValueError(f"model.num_experts: {self.num_experts}, must be 1 to {_MOST_EXPERTS:,}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"model.top_k: {self.top_k}, must be 1 to model.num_experts={self.num_experts}")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model has positions for; None where nothing limits it."""
        return None

    def fingerprint(self) -> str:
        """Return a digest of the files that the model is made of; empty: none."""
        return ""

    @abstractmethod
    def build(self, seed: int, device: str = "cpu") -> MoEModel:
        """Build the model; the same seed gives the same weights.

        Args:
            seed: of the weights.
            device: ``cpu``, or ``meta`` for a model without weights, which takes them from another rank.
        """
