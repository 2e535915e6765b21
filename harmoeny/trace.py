"""Where tokens went in the calibration batches: what a policy learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harmoeny.placement import IntArray


@dataclass(frozen=True)
class RoutingTrace:
    """Where the tokens of the calibration batches went, on all ranks together.

    Attributes:
        expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer in order of execution; negative where a token has none.
        stacks: per MoE layer, the stack that it belongs to (an encoder, a decoder): in all layers of one stack, row t
            is the same token.
    """

    expert_ids: Sequence[IntArray]
    stacks: Sequence[int]
