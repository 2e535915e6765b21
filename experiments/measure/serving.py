"""The open loop: requests arrive on their own, wait in a queue, and are served in batches of those that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.console import PointProgress
from experiments.measure.batch import Batch
from experiments.measure.rounds import timed_forward
from experiments.measure.turns import collector_paused, in_turn
from experiments.routers.base import FloatArray
from harmoeny.models.base import MoEModel
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System


@dataclass(frozen=True)
class Served:
    """One request; times are seconds since the first request of the round could have arrived.

    Attributes:
        system: the system that served it.
        round: round of interleaved systems.
        batch: batch of the round that it was served in.
        request: its number in the order of arrival.
        rank: the rank that served it.
        input_tokens: its length.
        arrival_s: when it arrived.
        start_s: when its batch began.
        first_token_s: when its first token was out.
    """

    system: str
    round: int
    batch: int
    request: int
    rank: int
    input_tokens: int
    arrival_s: float
    start_s: float
    first_token_s: float


def serve_rounds(
    model: MoEModel,
    engine: ExpertParallel,
    systems: Sequence[System],
    batches: Sequence[Batch],
    arrivals_s: Sequence[FloatArray],
    *,
    clock_offset_s: float,
    progress: PointProgress,
) -> list[Served]:
    """Let every system serve the same requests at the same arrival times, round after round; all ranks together.

    Args:
        model: the model, attached to ``engine``.
        engine: executes its MoE layers.
        systems: the systems to compare.
        batches: one per round; the sequences of all ranks' batches, with their routing, are the round's requests, again
            from the first where a round has more.
        arrivals_s: per round float64 ``[num_requests]``, ascending.
        clock_offset_s: seconds from this rank's clock to rank 0's.
        progress: told of every system's round.
    """
    served: list[Served] = []
    for round_index, (batch, times) in enumerate(zip(batches, arrivals_s, strict=True)):
        pool = Pool.gather(batch, engine.comm)
        for system in in_turn(systems, round_index):
            progress.step(f"open loop, round {round_index + 1} of {len(batches)}")
            engine.use(system)
            with collector_paused():
                found = _serve(model, engine, pool, times, len(batch.input_ids), clock_offset_s)
            engine.finish()
            rank, length = engine.comm.rank, batch.input_ids.shape[1]
            served += [Served(system.name, round_index, b, i, rank, length, *seen) for b, i, *seen in found]
            progress.advance()
    return served


@dataclass(frozen=True)
class Pool:
    """Sequences of all ranks with their routing.

    Attributes:
        input_ids: int64 ``[num_sequences, seq_len]``.
        expert_ids: int64 ``[num_sequences, tokens per sequence, top_k]`` per MoE layer.
    """

    input_ids: Tensor
    expert_ids: list[Tensor]

    @classmethod
    def gather(cls, batch: Batch, comm: Communicator) -> Pool:
        """Bring the batches of all ranks together; all ranks call it."""
        num_sequences = len(batch.input_ids)
        # The tokens of a sequence follow one another in every layer.
        own = [batch.input_ids, *(ids.view(num_sequences, -1, ids.shape[1]) for ids in batch.expert_ids)]
        everyone = [[tensor.cpu() for tensor in own]]
        if comm.world_size > 1:
            gathered: list[list[Tensor]] = [[] for _ in range(comm.world_size)]
            dist.all_gather_object(gathered, everyone[0])
            everyone = gathered
        input_ids, *expert_ids = (torch.cat(parts).to(comm.device) for parts in zip(*everyone, strict=True))
        return cls(input_ids, expert_ids)

    def take(self, requests: Sequence[int]) -> Batch:
        """Return a batch of some requests.

        A rank without requests has to take part in every layer all the same: it gets a sequence none of whose tokens
        goes to an expert.
        """
        rows = torch.tensor([i % len(self.input_ids) for i in requests] or [0], device=self.input_ids.device)
        expert_ids = [ids[rows].flatten(0, 1) for ids in self.expert_ids]
        if not requests:
            expert_ids = [torch.full_like(ids, -1) for ids in expert_ids]
        return Batch(self.input_ids[rows], expert_ids)


def _serve(
    model: MoEModel, engine: ExpertParallel, pool: Pool, arrivals_s: FloatArray, batch_size: int, clock_offset_s: float
) -> list[tuple[int, int, float, float, float]]:
    """Serve one round and return batch, request, arrival, start and first token of this rank's requests."""
    comm, found = engine.comm, []
    comm.barrier()
    begin_s = _from_rank_0(time.perf_counter(), comm)  # on rank 0's clock, as all times from here on
    done = batch_index = 0
    while done < len(arrivals_s):
        now_s = time.perf_counter() - begin_s  # only rank 0's counts
        if comm.rank == 0 and arrivals_s[done] > now_s:
            time.sleep(arrivals_s[done] - now_s)
            now_s = time.perf_counter() - begin_s
        waiting = int(np.searchsorted(arrivals_s, now_s, side="right")) - done
        number = int(_from_rank_0(float(min(max(waiting, 1), batch_size * comm.world_size)), comm))
        requests = [i for i in range(done, done + number) if i % comm.world_size == comm.rank]
        batch = pool.take(requests)
        model.context.tape.pin(batch.expert_ids)
        start_s, end_s = (t + clock_offset_s - begin_s for t in timed_forward(model, engine, batch))
        found += [(batch_index, i, float(arrivals_s[i]), start_s, end_s) for i in requests]
        done += number
        batch_index += 1
    return found


def _from_rank_0(value: float, comm: Communicator) -> float:
    if comm.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=comm.device)
    dist.broadcast(shared, 0)
    return float(shared)
