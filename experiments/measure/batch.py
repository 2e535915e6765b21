"""One rank's share of a batch and its routing, the same for every system."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.point.point import Point
from experiments.routers.base import CALIBRATION_BATCH, WARM_UP_BATCH
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
    options = point.options
    ids = tokens.batch(
        index=_text_index(point, index),
        rank=rank,
        world_size=options.world_size,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
    )
    input_ids = torch.from_numpy(ids).to(device)
    if point.router.from_model:
        dense_forward(model, input_ids, None)
        return Batch(input_ids, model.context.tape.recorded)
    expert_ids = [
        assigned(point, index=index, rank=rank, layer=layer, num_tokens=num_tokens)
        for layer, num_tokens in enumerate(model.layer_tokens(options.batch_size, options.seq_len))
    ]
    return Batch(input_ids, [ids.to(device) for ids in expert_ids])


def _text_index(point: Point, index: int) -> int:
    """Return where a batch's text stands: behind the measured batches that of calibration, then that of the warm-up."""
    if index < CALIBRATION_BATCH:
        return index
    if index < WARM_UP_BATCH:
        return point.most_rounds + index - CALIBRATION_BATCH
    return point.most_rounds + point.calibration_batches


def shared_text(point: Point, tokens: TokenFile) -> list[str]:
    """Name what reads text that is measured too, because the text is too short: ``calibration``, ``warm-up``."""
    options = point.options
    fresh = tokens.fresh_batches(sequences_per_batch=options.world_size * options.batch_size, seq_len=options.seq_len)
    learned = point.most_rounds + point.calibration_batches
    shared = ["calibration"] if point.calibration_batches and point.router.from_model and fresh < learned else []
    return [*shared, "warm-up"] if fresh < learned + 1 else shared


def assigned(
    point: Point, *, index: int, rank: int, layer: int, num_tokens: int, num_layers: int | None = None
) -> Tensor:
    """Let the point's router decide for one layer, as :meth:`Point.routing_request` says.

    Returns:
        int64 ``[num_tokens, top_k]``, on the CPU.
    """
    request = point.routing_request(batch=index, layer=layer, rank=rank, num_tokens=num_tokens, num_layers=num_layers)
    return torch.from_numpy(point.router.assign(request))


@contextmanager
def dense(model: MoEModel) -> Iterator[None]:
    """Compute MoE layers with the model's own code on this rank alone."""
    model.context.dense = True
    try:
        yield
    finally:
        model.context.dense = False


def dense_forward(
    model: MoEModel, input_ids: Tensor, expert_ids: Sequence[Tensor] | None, kept: Sequence[Tensor] | None = None
) -> Tensor:
    """Run the untouched model on this rank alone.

    Args:
        model: the model.
        input_ids: int64 ``[batch_size, seq_len]``.
        expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer, the routing; None: the model's own.
        kept: bool ``[num_tokens, top_k]`` per MoE layer, false where an assignment is dropped; its token's other
            routing weights stay what they are. None: nothing is dropped.
    """
    model.context.tape.pin(expert_ids, kept)
    with dense(model):
        return model.forward(input_ids)
