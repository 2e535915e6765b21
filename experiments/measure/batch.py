"""One rank's share of a batch and its routing, the same for every system."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.measure.check import dense_forward
from experiments.point.point import Point
from experiments.routers.base import CALIBRATION_BATCH, RoutingRequest
from experiments.text.tokens import TokenFile
from harmoeny.models.base import MoEModel


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch with its routing.

    Attributes:
        input_ids: int64 ``[batch_size, seq_len]``.
        expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer.
    """

    input_ids: Tensor
    expert_ids: list[Tensor]


def make_batch(point: Point, model: MoEModel, tokens: TokenFile, index: int, rank: int, device: torch.device) -> Batch:
    """Read a batch and decide its routing, so that every system gets the same of both."""
    batch_size, seq_len = point.options.batch_size, point.options.seq_len
    text_index = index if index < CALIBRATION_BATCH else point.options.rounds + index - CALIBRATION_BATCH
    ids = tokens.batch(
        index=text_index, rank=rank, world_size=point.options.world_size, batch_size=batch_size, seq_len=seq_len
    )
    input_ids = torch.from_numpy(ids).to(device)
    if point.router.from_model:
        model.context.tape.pin(None)
        dense_forward(model, input_ids)
        return Batch(input_ids, model.context.tape.recorded)
    requests = [
        RoutingRequest(
            num_tokens, model.num_experts, model.top_k, index, layer, rank, point.options.seed, point.options.world_size
        )
        for layer, num_tokens in enumerate(model.layer_tokens(batch_size, seq_len))
    ]
    return Batch(input_ids, [torch.from_numpy(point.router.assign(r)).to(device) for r in requests])
