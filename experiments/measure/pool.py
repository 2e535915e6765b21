"""The sequences that requests of an open loop are, with the routing that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.batch import Batch
from experiments.measure.decode import DecodeBatch
from harmoeny.runtime.exchange.comm import Communicator


@dataclass(frozen=True)
class Pool:
    """Sequences of all ranks with their routing; request i is sequence i, again from the first where there are more.

    Attributes:
        input_ids: int64 ``[num_sequences, seq_len]``.
        expert_ids: int64 ``[num_sequences, tokens per sequence, top_k]`` per MoE layer.
        tokens: int64 ``[num_sequences, num_steps]``, those that follow.
        step_expert_ids: int64 ``[num_sequences, num_steps, top_k]`` per MoE layer.
    """

    input_ids: Tensor
    expert_ids: list[Tensor]
    tokens: Tensor
    step_expert_ids: list[Tensor]

    @classmethod
    def gather(cls, batch: Batch, comm: Communicator, decode: DecodeBatch | None = None) -> Pool:
        """Bring the batches of all ranks together; all ranks call it.

        Args:
            batch: this rank's prompts.
            comm: the ranks.
            decode: the tokens that follow; None: none do.
        """
        num_sequences, num_layers = len(batch.input_ids), len(batch.expert_ids)
        # The tokens of a sequence follow one another in every layer.
        own = [batch.input_ids, *(ids.view(num_sequences, -1, ids.shape[1]) for ids in batch.expert_ids)]
        if decode is None:
            own += [batch.input_ids[:, :0], *(ids[:, :0] for ids in own[1:])]
        else:
            own += [decode.tokens.T, *(torch.stack(steps, dim=1) for steps in zip(*decode.expert_ids, strict=True))]
        everyone = [[tensor.cpu() for tensor in own]]
        if comm.world_size > 1:
            gathered: list[list[Tensor]] = [[] for _ in range(comm.world_size)]
            dist.all_gather_object(gathered, everyone[0])
            everyone = gathered
        merged = [torch.cat(parts).to(comm.device) for parts in zip(*everyone, strict=True)]
        prompts, steps = merged[: num_layers + 1], merged[num_layers + 1 :]
        return cls(prompts[0], prompts[1:], steps[0], steps[1:])

    def prompts(self, requests: Sequence[int]) -> Batch:
        """Return the prompts of some requests.

        A rank without requests has to take part in every layer all the same: it gets a sequence none of whose tokens
        goes to an expert.
        """
        rows = self._rows(requests or [0])
        expert_ids = [ids[rows].flatten(0, 1) for ids in self.expert_ids]
        if not requests:
            expert_ids = [torch.full_like(ids, -1) for ids in expert_ids]
        return Batch(self.input_ids[rows], expert_ids)

    def step(self, requests: Sequence[int], steps: Sequence[int]) -> Batch:
        """Return the present tokens of some requests as a batch of sequences of one token.

        Args:
            requests: their numbers; none: a token that goes to no expert.
            steps: how many tokens each has had, at least 1.
        """
        rows = self._rows(requests or [0])
        index = torch.tensor(list(steps) or [1], device=rows.device) - 1
        expert_ids = [ids[rows, index] for ids in self.step_expert_ids]
        if not requests:
            expert_ids = [torch.full_like(ids, -1) for ids in expert_ids]
        return Batch(self.tokens[rows, index][:, None], expert_ids)

    def _rows(self, requests: Sequence[int]) -> Tensor:
        return torch.tensor([i % len(self.input_ids) for i in requests], device=self.input_ids.device)
