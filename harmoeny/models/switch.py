"""Switch Transformers: its sparse layers keep their experts in a ModuleDict, so they need an adapter of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harmoeny.dependencies import require
from harmoeny.models.base import (
    DTYPES,
    AdaptedModule,
    ModelConfig,
    MoEBlock,
    MoEContext,
    MoEModel,
)
from harmoeny.models.kit.modules import device_of
from harmoeny.models.kit.sizes import require_positive
from harmoeny.runtime.memory.experts import LayerExperts, mlp

if TYPE_CHECKING:
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersLayerFF,
        SwitchTransformersSparseMLP,
    )

#: Our names of an expert's matrices, and Transformers' names of the layers that hold them.
_LINEARS = {"up": "wi", "down": "wo"}


@cache
def check_router_order() -> None:
    """Refuse releases of Transformers whose Switch router returns something else, or in another order.

    Raises:
        DependencyError: as in 5.17, whose router returns (probabilities, choice, logits).
    """
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    with torch.device("meta"):
        router = SwitchTransformersTop1Router(SwitchTransformersConfig(d_model=4, num_experts=3)).eval()
        found = router(torch.zeros(1, 2, 4))
    shapes = [tuple(part.shape) for part in found]
    in_order = shapes == [(1, 2, 3), (1, 2, 1), (1, 2, 3)] and not found[0].is_floating_point()
    require("transformers", "its Switch router must return (one-hot choice, probability, logits)", holds=in_order)


class SwitchRouter(nn.Module):
    """A Switch router whose choice the tape can pin; takes the place of the router in the untouched layer too."""

    def __init__(self, router: nn.Module, layer: int, context: MoEContext) -> None:
        super().__init__()
        self.router = router
        self.num_experts = router.num_experts  # the untouched layer asks its router for it
        self.layer = layer
        self.context = context

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route ``[batch_size, seq_len, hidden_size]``.

        Returns:
            Expert ids int64 ``[num_tokens, 1]`` (-1 where the model's capacity leaves a token out), their probabilities
            ``[num_tokens, 1]`` and the logits ``[batch_size, seq_len, num_experts]``.
        """
        mask, _, logits = self.router(hidden)
        own_choice = torch.where(mask.any(dim=-1), mask.argmax(dim=-1), -1).view(-1, 1)
        expert_ids = self.context.tape.choose(self.layer, own_choice)
        probabilities = torch.softmax(logits, dim=-1, dtype=logits.dtype).to(hidden.dtype).flatten(0, -2)
        return expert_ids, probabilities.gather(1, expert_ids.clamp(min=0)), logits

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Answer as Transformers' own router does: one-hot choice, probability and logits."""
        expert_ids, probabilities, logits = self.choose(hidden)
        expert_ids = self.context.tape.keep(self.layer, expert_ids)
        mask = torch.zeros_like(logits, dtype=torch.int64).flatten(0, -2)
        mask.scatter_(1, expert_ids.clamp(min=0), (expert_ids >= 0).long())
        return mask.view(logits.shape), probabilities.view(*logits.shape[:-1], 1), logits


class SwitchBlock(MoEBlock):
    """A sparse layer of a Switch Transformer."""

    def __init__(
        self, sparse_mlp: SwitchTransformersSparseMLP, experts: LayerExperts, layer: int, context: MoEContext
    ) -> None:
        super().__init__(layer, context)
        check_router_order()
        self.experts = experts
        self.router = SwitchRouter(sparse_mlp.router, layer, context)
        sparse_mlp.router = self.router
        # In a tuple the untouched layer is no submodule: its experts are no parameters of the model.
        self._untouched = (sparse_mlp,)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert ids and probabilities, ``[num_tokens, 1]``."""
        expert_ids, probabilities, _ = self.router.choose(hidden)
        return expert_ids, probabilities

    def forward_dense(self, hidden: Tensor) -> Tensor:
        """Run Transformers' own layer."""
        (sparse_mlp,) = self._untouched
        experts = {
            f"experts.expert_{e}.{linear}.weight": self.experts.weights[name][e].to(hidden.device)
            for e in range(self.experts.num_experts)
            for name, linear in _LINEARS.items()
        }
        output: Tensor = functional_call(sparse_mlp, experts, (hidden,))
        return output

    def untouched(self, device: torch.device) -> SwitchTransformersSparseMLP:
        """Return the untouched layer with its own router, and its experts' weights on ``device``."""
        (sparse_mlp,) = self._untouched
        sparse_mlp.router = self.router.router
        for expert_id, expert in enumerate(sparse_mlp.experts.values()):
            for name, linear in _LINEARS.items():
                weight = self.experts.weights[name][expert_id].to(device)
                getattr(expert, linear).weight = nn.Parameter(weight, requires_grad=False)
        return sparse_mlp


def stack_experts(sparse_mlp: SwitchTransformersSparseMLP, activation: str) -> LayerExperts:
    """Move a layer's experts into stacked tensors; the layer's own parameters are left without memory."""
    from transformers.activations import ACT2FN

    experts = list(sparse_mlp.experts.values())
    stacked = {
        name: torch.stack([getattr(expert, linear).weight.detach() for expert in experts])
        for name, linear in _LINEARS.items()
    }
    for expert in experts:
        expert.to("meta")
    return LayerExperts(stacked, mlp(ACT2FN[activation]), hidden_size=stacked["up"].shape[2])


def is_switch(module: nn.Module) -> bool:
    """Tell whether a module is a Switch Transformer with sparse layers."""
    return bool(_sparse_layers(module))


def _sparse_layers(module: nn.Module) -> list[SwitchTransformersLayerFF]:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersLayerFF,
        SwitchTransformersSparseMLP,
    )

    layers = [m for m in module.modules() if isinstance(m, SwitchTransformersLayerFF)]
    return [layer for layer in layers if isinstance(layer.mlp, SwitchTransformersSparseMLP)]


class AdaptedSwitch(AdaptedModule):
    """A Switch Transformer whose sparse layers are blocks."""

    def __init__(self, module: Any) -> None:
        context, device = MoEContext(), device_of(module)
        self._layers = _sparse_layers(module)
        self._blocks: list[SwitchBlock] = []
        for index, layer in enumerate(self._layers):
            stacked = stack_experts(layer.mlp, module.config.dense_act_fn)
            layer.mlp = SwitchBlock(layer.mlp, stacked, index, context)
            self._blocks.append(layer.mlp)
        super().__init__(module, [block.experts for block in self._blocks], context, device)

    @property
    def bare(self) -> Sequence[nn.Module]:
        """The sparse layers."""
        return self._blocks

    def restore(self) -> None:
        """Put the untouched layers back."""
        for layer, block in zip(self._layers, self._blocks, strict=True):
            layer.mlp = block.untouched(self.device)


class SwitchModel(MoEModel):
    """A Switch Transformer with expert-parallel sparse layers; a forward pass is the encoder and one decoder step."""

    def __init__(self, module: SwitchTransformersForConditionalGeneration) -> None:
        self._encoder_layers = len(_sparse_layers(module.encoder))
        super().__init__(AdaptedSwitch(module), top_k=1)
        self._start_token = int(module.config.decoder_start_token_id)

    @property
    def stacks(self) -> list[int]:
        """Return 0 for the encoder's MoE layers and 1 for the decoder's."""
        return [int(layer >= self._encoder_layers) for layer in range(len(self.experts))]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the first output token's logits, ``[batch_size, vocab_size]``."""
        start = torch.full((input_ids.shape[0], 1), self._start_token, dtype=torch.int64, device=input_ids.device)
        output: Any = self.module(input_ids=input_ids, decoder_input_ids=start, use_cache=False)
        logits: Tensor = output.logits
        return logits[:, -1]

    def layer_tokens(self, batch_size: int, seq_len: int) -> list[int]:
        """Return the tokens per MoE layer: all of them in the encoder, one per sequence in the decoder."""
        decoder_layers = len(self.experts) - self._encoder_layers
        return [batch_size * seq_len] * self._encoder_layers + [batch_size] * decoder_layers


@dataclass(kw_only=True)
class Switch(ModelConfig):
    """A Switch Transformer (arXiv 2101.03961) with seeded random weights.

    Attributes:
        hidden_size: model width (``d_model``).
        intermediate_size: width of every expert (``d_ff``).
        num_layers: encoder layers.
        num_decoder_layers: decoder layers.
        num_heads: attention heads.
        head_size: width of a head (``d_kv``).
        sparse_step: every so many layers one has experts; 1 means all.
        expert_capacity: tokens of one sequence that an expert takes before the model itself drops them.
    """

    name: ClassVar[str] = "switch"
    description: ClassVar[str] = "Switch Transformer with seeded random weights, top-1 routing"

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 4
    num_decoder_layers: int = 2
    num_heads: int = 4
    head_size: int = 32
    sparse_step: int = 1
    expert_capacity: int = 1_000_000

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a size below 1, a top_k other than 1, or a sparse step that leaves no sparse layer.
        """
        super().validate()
        if self.top_k != 1:
            raise ValueError(f"model.top_k: {self.top_k}, must be 1: Switch Transformers route to one expert")
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_decoder_layers", "num_heads", "head_size")
        require_positive("model", **{size: getattr(self, size) for size in (*sizes, "expert_capacity")})
        if not 1 <= self.sparse_step <= self.num_layers:
            raise ValueError(f"model.sparse_step: {self.sparse_step}, must be 1 to model.num_layers={self.num_layers}")

    def build(self, seed: int, device: str = "cpu") -> MoEModel:
        """Build the model from Transformers' own class."""
        from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

        config = SwitchTransformersConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_ff=self.intermediate_size,
            d_kv=self.head_size,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            num_decoder_layers=self.num_decoder_layers,
            num_sparse_encoder_layers=self.num_layers // self.sparse_step,
            num_sparse_decoder_layers=max(1, self.num_decoder_layers // self.sparse_step),
            num_experts=self.num_experts,
            expert_capacity=self.expert_capacity,
            decoder_start_token_id=0,
        )
        torch.manual_seed(seed)
        with torch.device(device):
            module = SwitchTransformersForConditionalGeneration(config).to(DTYPES[self.dtype])
        return SwitchModel(module.eval())
