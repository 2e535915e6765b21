"""The open loop: requests arrive on their own, wait in a queue, and are served in batches of those that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.batch import Batch
from experiments.measure.bench import Bench
from experiments.measure.rounds import timed_forward
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.request_rows import Served
from experiments.routers.base import FloatArray
from harmoeny.runtime.exchange.comm import Communicator


def serve_rounds(bench: Bench, arrivals_s: Sequence[FloatArray]) -> list[Served]:
    """Let every system serve the same requests at the same arrival times, round after round; all ranks together.

    The sequences of all ranks' batches, with their routing, are a round's requests, again from the first where a round
    has more.

    Args:
        bench: what to measure.
        arrivals_s: per round float64 ``[num_requests]``, ascending.
    """
    served: list[Served] = []
    bench.begin_loop()
    for round_index, (batch, times) in enumerate(zip(bench.batches, arrivals_s, strict=True)):
        pool = Pool.gather(batch, bench.comm)
        bench.rig.begin_round()
        for system in in_turn(bench.systems, round_index, len(bench.batches)):
            bench.progress.say(f"open loop, round {round_index + 1} of {len(bench.batches)}")
            bench.engine.use(system)
            with collector_paused():
                passes = _serve(bench, pool, times, len(batch.input_ids))
            bench.engine.finish()
            served += [
                Served(
                    system=system.name,
                    round=round_index,
                    batch=index,
                    request=request,
                    rank=bench.comm.rank,
                    input_tokens=batch.input_ids.shape[1],
                    arrival_s=float(times[request]),
                    start_s=done.start_s,
                    first_token_s=done.first_token_s,
                )
                for index, done in enumerate(passes)
                for request in done.requests
            ]
            bench.progress.advance()
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


@dataclass(frozen=True)
class ServedBatch:
    """One batch of a round; times are seconds from the round's beginning, on rank 0's clock.

    Attributes:
        requests: numbers of this rank's requests in it.
        start_s: when it began.
        first_token_s: when its first tokens were out.
    """

    requests: list[int]
    start_s: float
    first_token_s: float


def _serve(bench: Bench, pool: Pool, arrivals_s: FloatArray, batch_size: int) -> list[ServedBatch]:
    """Serve one round, batch after batch of those that wait."""
    comm, batches = bench.comm, []
    comm.barrier()
    begin_s = _from_rank_0(time.perf_counter(), comm)  # on rank 0's clock, as all times from here on
    num_done = 0
    while num_done < len(arrivals_s):
        now_s = time.perf_counter() - begin_s  # only rank 0's counts
        if comm.rank == 0 and arrivals_s[num_done] > now_s:
            time.sleep(arrivals_s[num_done] - now_s)
            now_s = time.perf_counter() - begin_s
        waiting = int(np.searchsorted(arrivals_s, now_s, side="right")) - num_done
        number = int(_from_rank_0(float(min(max(waiting, 1), batch_size * comm.world_size)), comm))
        requests = [i for i in range(num_done, num_done + number) if i % comm.world_size == comm.rank]
        start_s, end_s = (t + bench.rig.clock_offset_s - begin_s for t in timed_forward(bench, pool.take(requests)))
        batches.append(ServedBatch(requests, start_s, end_s))
        num_done += number
    return batches


def _from_rank_0(value: float, comm: Communicator) -> float:
    if comm.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=comm.device)
    dist.broadcast(shared, 0)
    return float(shared)
