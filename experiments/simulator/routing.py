"""The routing of simulated batches, the same as ranks would get."""

from __future__ import annotations

import numpy as np
import torch

from experiments.measure.batch import make_batch
from experiments.point.point import Point
from experiments.routers.base import RoutingRequest
from experiments.simulator.model_work import ModelWork
from experiments.text.tokens import TokenFile
from harmoeny.models.base import MoEModel
from harmoeny.placement import IntArray


class Routing:
    """The routing of a point's batches."""

    def __init__(self, point: Point, tokens: TokenFile | None) -> None:
        self._point, self._tokens = point, tokens
        self._model: MoEModel | None = None
        self._counts: dict[tuple[int, int], list[IntArray]] = {}
        self._steps: dict[tuple[int, int, int], list[IntArray]] = {}
        self._sequences: dict[tuple[int, int], list[IntArray]] = {}
        self._step_ids: dict[tuple[int, int, int], list[IntArray]] = {}
        if point.router.from_model:
            self._model = point.model.build(point.options.seed)

    def counts(self, work: ModelWork, index: int, batch_size: int) -> list[IntArray]:
        """Return int64 ``[world_size, num_experts]`` per MoE layer of one batch."""
        key = (index, batch_size)
        if key not in self._counts:
            self._counts[key] = self._count(work, index)
        return self._counts[key]

    def step_counts(self, work: ModelWork, index: int, step: int) -> list[IntArray]:
        """Return int64 ``[world_size, num_experts]`` per MoE layer of one step of a batch's decode phase.

        Args:
            work: of one step.
            index: of the batch.
            step: from 0.
        """
        key = (index, work.layer_tokens[0], step)
        if key not in self._steps:
            self._steps[key] = self._drawn(work, index, (step + 1) * len(work.layer_tokens))
        return self._steps[key]

    def expert_ids(self, work: ModelWork, index: int) -> list[IntArray]:
        """Return int64 ``[num_tokens of all ranks, top_k]`` per MoE layer of one batch."""
        if self._model is not None:
            batches = [self._recorded(index, rank) for rank in range(self._point.options.world_size)]
            return [np.concatenate([batch[layer] for batch in batches]) for layer in range(len(work.layer_tokens))]
        return self._assigned(work, index, 0)

    def sequences(self, work: ModelWork, index: int, batch_size: int) -> list[IntArray]:
        """Return int64 ``[num_sequences of all ranks, num_experts]`` per MoE layer of one batch, by sequence."""
        key = (index, batch_size)
        if key not in self._sequences:
            number = batch_size * self._point.options.world_size
            ids = self.expert_ids(work, index)
            self._sequences[key] = [_counted(layer.reshape(number, -1), work.num_experts) for layer in ids]
        return self._sequences[key]

    def steps(self, work: ModelWork, index: int, batch_size: int, num_steps: int) -> list[IntArray]:
        """Return int64 ``[num_steps, num_sequences of all ranks, top_k]`` per MoE layer of the tokens after a batch.

        Args:
            work: of one step.
            index: of the batch.
            batch_size: its sequences per rank.
            num_steps: how many tokens, at least 1.
        """
        key = (index, batch_size, num_steps)
        if key not in self._step_ids:
            num_layers = len(work.layer_tokens)
            ids = [self._assigned(work, index, (step + 1) * num_layers) for step in range(num_steps)]
            self._step_ids[key] = [np.stack(layer) for layer in zip(*ids, strict=True)]
        return self._step_ids[key]

    def _assigned(self, work: ModelWork, index: int, first: int) -> list[IntArray]:
        """Let the router assign the tokens of all ranks in layers that follow the first one."""
        router, ranks = self._point.router, range(self._point.options.world_size)
        return [
            np.concatenate([router.assign(self._request(work, index, first + layer, rank)) for rank in ranks])
            for layer in range(len(work.layer_tokens))
        ]

    def _count(self, work: ModelWork, index: int) -> list[IntArray]:
        ranks, layers = range(self._point.options.world_size), range(len(work.layer_tokens))
        if self._model is not None:
            batches = [self._recorded(index, rank) for rank in ranks]
            # Negative ids are assignments that the model itself leaves out.
            width = work.num_experts + 1
            return [
                np.stack([np.bincount(b[layer].ravel() + 1, minlength=width)[1:] for b in batches]).astype(np.int64)
                for layer in layers
            ]
        return self._drawn(work, index, 0)

    def _drawn(self, work: ModelWork, index: int, first: int) -> list[IntArray]:
        """Let the router draw the counts of layers that follow the first one."""
        router, ranks = self._point.router, range(self._point.options.world_size)
        return [
            np.stack([router.count(self._request(work, index, first + layer, rank)) for rank in ranks])
            for layer in range(len(work.layer_tokens))
        ]

    def _request(self, work: ModelWork, index: int, layer: int, rank: int) -> RoutingRequest:
        num_layers = len(work.layer_tokens)
        num_tokens = work.layer_tokens[layer % num_layers]
        return self._point.routing_request(
            batch=index, layer=layer, rank=rank, num_tokens=num_tokens, num_layers=num_layers
        )

    def _recorded(self, index: int, rank: int) -> list[IntArray]:
        assert self._model is not None
        assert self._tokens is not None, "router=model needs text"
        with torch.inference_mode():
            batch = make_batch(self._point, self._model, self._tokens, index, rank, torch.device("cpu"))
        return [ids.numpy() for ids in batch.expert_ids]


def with_shared_counts(counts: IntArray, work: ModelWork) -> IntArray:
    """Return int64 ``[world_size, all experts]``: as many assignments of every shared expert as a rank has tokens.

    Args:
        counts: int64 ``[world_size, num_experts]``; where the model leaves assignments out, tokens are those that the
            others make.
        work: the model.
    """
    if work.num_shared == 0:
        return counts
    num_tokens = -(-counts.sum(axis=1, keepdims=True) // work.top_k)
    return np.concatenate([counts, np.repeat(num_tokens, work.num_shared, axis=1)], axis=1)


def _counted(expert_ids: IntArray, num_experts: int) -> IntArray:
    """Return int64 ``[num_rows, num_experts]``, how many of ``[num_rows, assignments]`` go where."""
    counts = np.zeros((len(expert_ids), num_experts + 1), dtype=np.int64)
    # Negative ids are assignments that are left out.
    np.add.at(counts, (np.arange(len(expert_ids))[:, None], expert_ids), 1)
    return counts[:, :-1]
