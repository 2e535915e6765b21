"""A stack of MoE layers and nothing else: the micro-benchmark of the layer itself, at any size and top_k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from harmoeny.models.base import DTYPES, AdaptedModule, ModelConfig, MoEBlock, MoEContext, MoEModel
from harmoeny.models.kit.sizes import require_positive
from harmoeny.runtime.memory.experts import LayerExperts, gated_mlp, mlp, swiglu


class StackBlock(MoEBlock):
    """A linear router and its experts."""

    def __init__(self, router: nn.Linear, experts: LayerExperts, top_k: int, layer: int, context: MoEContext) -> None:
        super().__init__(layer, context)
        self.router = router
        self.top_k = top_k
        self._experts = experts

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the top_k experts by softmax probability, renormalised over the chosen ones."""
        probabilities = torch.softmax(self.router(hidden).flatten(0, -2).float(), dim=-1)
        expert_ids = self.context.tape.choose(self.layer, probabilities.topk(self.top_k, dim=-1).indices)
        chosen = probabilities.gather(1, expert_ids.clamp(min=0)) * (expert_ids >= 0)
        total = chosen.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)  # a token may have none
        return expert_ids, (chosen / total).to(hidden.dtype)

    def forward_dense(self, hidden: Tensor) -> Tensor:
        """Apply expert after expert to the tokens that chose it, as eager implementations do."""
        expert_ids, routing_weights = self.route(hidden)
        expert_ids = self.context.tape.keep(self.layer, expert_ids)
        rows = hidden.flatten(0, -2)
        output = torch.zeros_like(rows)
        for expert_id in range(self._experts.num_routed):
            token, k = torch.where(expert_ids == expert_id)
            if token.numel():
                output.index_add_(0, token, self._execute(expert_id, rows[token]) * routing_weights[token, k, None])
        for shared in range(self._experts.num_routed, self._experts.num_experts):
            output += self._execute(shared, rows)
        return output.view_as(hidden)

    def _execute(self, expert_id: int, rows: Tensor) -> Tensor:
        weights = {name: w.to(rows.device) for name, w in self._experts.expert(expert_id).items()}
        result = torch.empty_like(rows)
        self._experts.function(weights, rows, result)
        return result


class _Stack(nn.Module):
    """Embeds tokens and applies ``x + block(norm(x))`` layer by layer."""

    def __init__(self, embedding: nn.Embedding, blocks: list[StackBlock]) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block(nn.functional.rms_norm(hidden, hidden.shape[-1:]))
        return hidden


class MoEStackModel(MoEModel):
    """The stack as a model; its forward pass gives the last hidden states."""

    scope: ClassVar[str] = "layer"

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the stack's output, ``[batch_size, seq_len, hidden_size]``."""
        output: Tensor = self.module(input_ids)
        return output

    def layer_tokens(self, batch_size: int, seq_len: int) -> list[int]:
        """Return the tokens per MoE layer: all of them."""
        return [batch_size * seq_len] * len(self.experts)


@dataclass(kw_only=True)
class MoEStack(ModelConfig):
    """MoE layers only, with the expert sizes of Switch-Base.

    Attributes:
        hidden_size: width of a token.
        intermediate_size: width of every expert.
        num_layers: MoE layers.
        gated: experts with a gate (SwiGLU), as Mixtral's and Qwen's, in place of Switch's two matrices with ReLU.
        bias: experts with biases.
        num_shared_experts: shared experts per layer, as wide as the others, which every token goes to with weight 1.
    """

    name: ClassVar[str] = "moe_stack"
    description: ClassVar[str] = "MoE layers only (768/3072, ReLU): the micro-benchmark"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 1
    gated: bool = False
    bias: bool = False
    num_shared_experts: int = 0

    @property
    def num_shared(self) -> int:
        """All of them."""
        return self.num_shared_experts

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a size below 1, or fewer shared experts than none.
        """
        super().validate()
        if self.num_shared_experts < 0:
            raise ValueError(f"model.num_shared_experts: {self.num_shared_experts}, must be at least 0")
        sizes = ("hidden_size", "intermediate_size", "num_layers", "vocab_size")
        require_positive("model", **{size: getattr(self, size) for size in sizes})

    def build(self, seed: int, device: str = "cpu") -> MoEModel:
        """Draw the weights; their scale keeps the activations' size over many layers."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*shape: int, fan_in: int) -> Tensor:
            if device == "meta":
                return torch.empty(*shape, dtype=dtype, device=device)
            return torch.randn(*shape, generator=generator).mul_(fan_in**-0.5).to(dtype)

        context = MoEContext()
        experts, blocks = [], []
        for layer in range(self.num_layers):
            experts.append(self._experts(normal))
            router = nn.Linear(self.hidden_size, self.num_experts, bias=False, dtype=dtype, device="meta")
            router.weight = nn.Parameter(normal(self.num_experts, self.hidden_size, fan_in=self.hidden_size))
            blocks.append(StackBlock(router, experts[-1], self.top_k, layer, context))
        # Drawn on "meta" as the routers are, an embedding would import torch's compiler: a second on every rank.
        weights = normal(self.vocab_size, self.hidden_size, fan_in=1)
        embedding = nn.Embedding(self.vocab_size, self.hidden_size, _weight=weights)
        stack = _Stack(embedding, blocks).eval()
        return MoEStackModel(AdaptedModule(stack, experts, context, torch.device(device)), self.top_k)

    def _experts(self, normal: Callable[..., Tensor]) -> LayerExperts:
        e, h, i = self.num_experts + self.num_shared_experts, self.hidden_size, self.intermediate_size
        name, width = ("gate_up", 2 * i) if self.gated else ("up", i)
        weights = {name: normal(e, width, h, fan_in=h), "down": normal(e, h, i, fan_in=i)}
        if self.bias:
            weights |= {f"{name}_bias": normal(e, width, fan_in=h), "down_bias": normal(e, h, fan_in=i)}
        function = gated_mlp(swiglu) if self.gated else mlp(torch.relu)
        return LayerExperts(weights, function, h, self.num_shared_experts)
