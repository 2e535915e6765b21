"""What a MoE layer must compute from the tokens that it got: expert after expert on this rank, nothing exchanged.

The output of a whole model tells little of its MoE layers where these add little to it; here every layer is compared
with its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harmoeny.runtime.layer.executor import LayerInput, LayerResult
from harmoeny.runtime.memory.experts import LayerExperts


class LayerErrors:
    """Compares every MoE layer that it is shown; an observer of the engine.

    Attributes:
        worst: largest absolute error of a layer's output, relative to the layer's largest output.
        layer: which layer that was.
    """

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        self._layers = layers
        self.worst, self.layer = 0.0, 0

    def __call__(self, given: LayerInput, result: LayerResult) -> None:
        """Compare one layer."""
        if not result.output_TH.numel():
            return
        executed = result.executed_mask(given.expert_ids_TK)
        expected = layer_output(self._layers[given.layer], given, executed)
        error = float((result.output_TH.float() - expected).abs().max())
        scale = float(expected.abs().max())
        relative = error / scale if scale else error
        if not relative <= self.worst:  # NaN is the worst
            self.worst, self.layer = relative, given.layer


def layer_output(experts: LayerExperts, given: LayerInput, executed: Tensor) -> Tensor:
    """Return float32 ``[num_tokens, hidden_size]``, the weighted sum of the experts' outputs.

    Args:
        experts: the layer's.
        given: this rank's tokens.
        executed: bool ``[num_tokens, top_k]``, the assignments that count.
    """
    output = torch.zeros_like(given.hidden_TH, dtype=torch.float32)
    for expert_id in range(experts.num_experts):
        token, k = torch.where((given.expert_ids_TK == expert_id) & executed)
        if token.numel():
            rows = given.hidden_TH[token]
            result = torch.empty_like(rows)
            weights = {name: w.to(rows.device) for name, w in experts.expert(expert_id).items()}
            experts.function(weights, rows, result)
            output.index_add_(0, token, result.float() * given.routing_weights_TK[token, k, None].float())
    return output
