"""The open loop: requests arrive on their own, wait in a queue, and get their tokens together with those that run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from experiments.measure.batch import Batch
from experiments.measure.bench import Bench
from experiments.measure.decode import make_decode_batch
from experiments.measure.pool import Pool
from experiments.measure.schedule import Pass, Schedule
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.request_rows import Served, num_good
from experiments.routers.base import FloatArray
from harmoeny.models.kit.sequences import RunningSequences
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.system import System


@dataclass(frozen=True)
class Round:
    """What every system serves in a round.

    Attributes:
        pool: the requests.
        arrivals_s: float64 ``[num_requests]``, ascending.
    """

    pool: Pool
    arrivals_s: FloatArray


def serve_rates(bench: Bench) -> list[Served]:
    """Let every system serve the requests of every rate, up to the first at which too few keep the limits.

    All ranks call it together.
    """
    options = bench.point.options
    requests, slo = options.requests, options.slo
    bench.progress.say("open loop: preparing requests")
    pools = [_pool(bench, index) for index in range(len(bench.batches))]
    default = 2 * options.world_size * options.batch_size
    served: list[Served] = []
    systems = list(bench.systems)
    for number, rate in enumerate(requests.rates()):
        if number:
            bench.progress.expect(len(systems) * len(pools))
        times = [requests.times(options.seed, i, default, rate) for i in range(len(pools))]
        at = f" at {rate:g} requests/s" if rate else ""
        rounds = [Round(pool, arrivals_s) for pool, arrivals_s in zip(pools, times, strict=True)]
        here = [replace(one, rate_per_s=rate) for one in serve_rounds(bench, rounds, systems, at)]
        served += here
        if requests.rate_step is not None:
            least = slo.share * sum(map(len, times))
            good = _everyones([num_good(here, system.name, slo.limits) for system in systems], bench.comm)
            systems = [system for system, count in zip(systems, good, strict=True) if count >= least]
        if not systems:
            break
    return served


def serve_rounds(
    bench: Bench, rounds: Sequence[Round], systems: Sequence[System] | None = None, at: str = ""
) -> list[Served]:
    """Let systems serve the same requests at the same arrival times, round after round; all ranks together.

    Args:
        bench: what to measure.
        rounds: what they serve.
        systems: which; None: all.
        at: says at which rate, as in `` at 8 requests/s``.
    """
    systems = bench.systems if systems is None else systems
    served: list[Served] = []
    bench.begin_loop()
    for index, one in enumerate(rounds):
        bench.rig.begin_round()
        for system in in_turn(systems, index, len(rounds)):
            bench.progress.say(f"open loop{at}, round {index + 1} of {len(rounds)}")
            bench.engine.use(system)
            server = _Server(bench, one, system, index)
            with collector_paused():
                server.serve()
            bench.engine.finish()
            served += server.served()
            bench.progress.advance()
    return served


def _pool(bench: Bench, index: int) -> Pool:
    """Return a round's requests: the sequences of all ranks' batches, with the tokens that the untouched model adds."""
    batch, num_steps = bench.batches[index], bench.point.options.requests.output_tokens - 1
    decode = make_decode_batch(bench, batch, index, num_steps) if num_steps else None
    return Pool.gather(batch, bench.comm, decode)


class _Server:
    """One rank's part in one system's round; times are seconds from the round's beginning, on rank 0's clock."""

    def __init__(self, bench: Bench, one: Round, system: System, round_index: int) -> None:
        options = bench.point.options
        self._bench, self._pool, self._arrivals_s = bench, one.pool, one.arrivals_s
        self._system, self._round = system.name, round_index
        self._keeps = options.requests.output_tokens > 1
        self._schedule = Schedule(
            len(one.arrivals_s), options.world_size, options.batch_size, options.requests.output_tokens
        )
        self._running = RunningSequences()
        self._tokens_s: dict[int, list[float]] = {}
        self._starts: dict[int, tuple[int, float]] = {}

    def serve(self) -> None:
        """Serve all requests of the round."""
        bench, comm = self._bench, self._bench.comm
        comm.barrier()
        begin_s = _from_rank_0(time.perf_counter(), comm)  # on rank 0's clock, as all times from here on
        number = 0
        while not self._schedule.done:
            num_arrived = int(_from_rank_0(float(self._wait(begin_s) if comm.rank == 0 else 0), comm))
            todo = self._schedule.next(num_arrived)
            start_s, end_s = (t + bench.rig.clock_offset_s - begin_s for t in self._execute(todo))
            for request in todo.requests[comm.rank]:
                self._starts.setdefault(request, (number, start_s))
                self._tokens_s.setdefault(request, []).append(end_s)
            number += 1

    def served(self) -> list[Served]:
        """Return this rank's requests."""
        return [
            Served(
                system=self._system,
                round=self._round,
                batch=self._starts[request][0],
                request=request,
                rank=self._bench.comm.rank,
                input_tokens=self._pool.input_ids.shape[1],
                arrival_s=float(self._arrivals_s[request]),
                start_s=self._starts[request][1],
                first_token_s=first_s,
                later_s=later_s,
            )
            for request, (first_s, *later_s) in self._tokens_s.items()
        ]

    def _wait(self, begin_s: float) -> int:
        """Return how many requests have arrived by now; where there is nothing else to do, wait for the next."""
        now_s, times = time.perf_counter() - begin_s, self._arrivals_s
        if self._schedule.idle and times[self._schedule.num_taken] > now_s:
            time.sleep(times[self._schedule.num_taken] - now_s)
            now_s = max(time.perf_counter() - begin_s, times[self._schedule.num_taken])
        return int(np.searchsorted(times, now_s, side="right"))

    def _execute(self, todo: Pass) -> tuple[float, float]:
        """Compute one pass; return when this rank left the barrier and when it was done, in s."""
        bench, rank = self._bench, self._bench.comm.rank
        requests, steps = todo.requests[rank], todo.steps[rank]
        batch = self._pool.prompts(requests) if todo.prefill else self._pool.step(requests, steps)
        bench.model.context.tape.pin(batch.expert_ids)
        bench.comm.barrier()
        bench.engine.recorder.begin_iteration()
        start_s = time.perf_counter()
        if todo.prefill:
            self._prefill(batch, len(requests))
        else:
            self._decode(batch, requests)
        # The tokens are out when the compute stream is done; copy streams may still restore residents.
        Device.of(bench.comm.device).synchronize_compute()
        end_s = time.perf_counter()
        if not todo.prefill:
            of_rank = self._schedule.running[rank]
            self._running.keep([row for row, request in enumerate(requests) if request in of_rank])
        return start_s, end_s

    def _prefill(self, batch: Batch, num_requests: int) -> None:
        model = self._bench.model
        if not self._keeps or not num_requests:
            model.forward(batch.input_ids)
            return
        _, cache = model.prefill(batch.input_ids)
        self._running.add(cache, num_requests, batch.input_ids.shape[1])

    def _decode(self, batch: Batch, requests: Sequence[int]) -> None:
        model = self._bench.model
        if requests:
            model.decode_running(batch.input_ids[:, 0], self._running)
        else:
            model.forward(batch.input_ids)


def _from_rank_0(value: float, comm: Communicator) -> float:
    if comm.world_size == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=comm.device)
    dist.broadcast(shared, 0)
    return float(shared)


def _everyones(counts: Sequence[int], comm: Communicator) -> list[int]:
    """Return sums over ranks."""
    total = torch.tensor(counts, dtype=torch.int64, device=comm.device)
    if comm.world_size > 1:
        dist.all_reduce(total)
    return [int(count) for count in total]
