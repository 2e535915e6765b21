"""The loops of one simulated system: the batches of the closed loop, an open loop of requests, and a decode phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.console import PointProgress
from experiments.point.point import Point
from experiments.results.layer_rows import RankIteration
from experiments.results.request_rows import Decoded, Served, decode_totals
from experiments.routers.base import FloatArray
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.model_work import TracedModel
from experiments.simulator.routing import Routing
from harmoeny.placement import IntArray


@dataclass(frozen=True)
class SystemLoops:
    """What a point asks of one system; every loop begins with a system that has seen no batch before.

    Attributes:
        point: the point.
        name: the system's.
        batch_size: its sequences per rank.
        make_system: makes it, for batches of that size.
        traced: the model's work by batch size.
        routing: of the point's batches.
        progress: advanced once per round of every loop.
    """

    point: Point
    name: str
    batch_size: int
    make_system: Callable[[], SimulatedSystem]
    traced: TracedModel
    routing: Routing
    progress: PointProgress

    def closed(self, first_iteration: int) -> list[RankIteration]:
        """Execute one batch per round; iterations are numbered from ``first_iteration`` on."""
        system, records = self.make_system(), []
        for index in range(self.point.options.rounds):
            system.begin_round("closed", index)
            batch = system.run(self.routing.counts(system.cost.work, index, self.batch_size))
            rows = [layer.rows() for layer in batch.layers]
            records += [
                RankIteration(
                    system=self.name,
                    round=index,
                    iteration=first_iteration + index,
                    rank=rank,
                    start_s=0.0,
                    end_s=float(batch.end_s[rank]),
                    drain_s=float(batch.drain_s[rank]),
                    num_sequences=self.batch_size,
                    input_tokens=self.batch_size * self.point.options.seq_len,
                    layers=[layer[rank] for layer in rows],
                )
                for rank in range(self.point.options.world_size)
            ]
            self.progress.advance()
        return records

    def served(self) -> list[Served]:
        """Serve requests as they arrive; a round's are the sequences of its batch, again and again."""
        system, options = self.make_system(), self.point.options
        default = 2 * options.world_size * options.batch_size
        served = []
        for index in range(options.rounds):
            system.begin_round("open", index)
            served += self._serve(system, index, options.requests.times(options.seed, index, default))
            self.progress.advance()
        return served

    def decoded(self) -> list[Decoded]:
        """Execute one batch per round, then the steps that follow it."""
        system, options = self.make_system(), self.point.options
        prompt_work = system.cost.work
        step_work = self.traced.decode_work(self.batch_size, options.decode_tokens)
        decoded = []
        for index in range(options.rounds):
            system.begin_round("decode", index)
            system.resize(prompt_work)
            counts = self.routing.counts(prompt_work, index, self.batch_size)
            first_s, _ = system.forward(counts, np.zeros(options.world_size))
            system.resize(step_work)
            last_s, rows = first_s, []
            for step in range(options.decode_tokens):
                last_s, layers = system.forward(self.routing.step_counts(step_work, index, step), last_s)
                rows += [row for layer in layers for row in layer.rows()]
            system.finish()
            decoded += [
                Decoded(
                    system=self.name,
                    round=index,
                    rank=rank,
                    num_sequences=self.batch_size,
                    num_steps=options.decode_tokens,
                    first_token_s=float(first_s[rank]),
                    last_token_s=float(last_s[rank]),
                    totals=decode_totals(row for row in rows if row["rank"] == rank),
                )
                for rank in range(options.world_size)
            ]
            self.progress.advance()
        return decoded

    def _serve(self, system: SimulatedSystem, index: int, arrivals_s: FloatArray) -> list[Served]:
        """Serve a round's requests (float64 ``[num_requests]``, ascending), batch after batch of those that wait."""
        world_size, seq_len = self.point.options.world_size, self.point.options.seq_len
        pool = self._pool(index)
        served: list[Served] = []
        now_s, batch = 0.0, 0
        while len(served) < len(arrivals_s):
            first = len(served)
            now_s = max(now_s, float(arrivals_s[first]))
            waiting = int(np.searchsorted(arrivals_s, now_s, side="right")) - first
            requests = np.arange(first, first + min(waiting, self.batch_size * world_size))
            ranks = requests % world_size
            # All ranks take part in a layer, so the one with the most sequences decides how long the rest takes.
            system.resize(self.traced.work(int(np.bincount(ranks).max())))
            end_s, _ = system.forward(_counts(pool, requests, ranks, world_size), np.full(world_size, now_s))
            served += [
                Served(
                    system=self.name,
                    round=index,
                    batch=batch,
                    request=int(request),
                    rank=int(rank),
                    input_tokens=seq_len,
                    arrival_s=float(arrivals_s[request]),
                    start_s=now_s,
                    first_token_s=float(end_s[rank]),
                )
                for request, rank in zip(requests, ranks, strict=True)
            ]
            now_s, batch = float(end_s.max()), batch + 1
        system.finish()
        return served

    def _pool(self, index: int) -> list[IntArray]:
        """Return int64 ``[num_sequences of all ranks, num_experts]`` per MoE layer, a batch's assignments."""
        work = self.traced.work(self.batch_size)
        num_sequences = self.batch_size * self.point.options.world_size
        pool = []
        for ids in self.routing.expert_ids(work, index):
            counts = np.zeros((num_sequences, work.num_experts + 1), dtype=np.int64)
            # Negative ids are assignments that are left out.
            np.add.at(counts, (np.arange(num_sequences)[:, None], ids.reshape(num_sequences, -1)), 1)
            pool.append(counts[:, :-1])
        return pool


def _counts(pool: Sequence[IntArray], requests: IntArray, ranks: IntArray, world_size: int) -> list[IntArray]:
    """Return int64 ``[world_size, num_experts]`` per MoE layer of requests that are dealt out to ranks."""
    found = []
    for of_sequence in pool:
        counts = np.zeros((world_size, of_sequence.shape[1]), dtype=np.int64)
        np.add.at(counts, ranks, of_sequence[requests % len(of_sequence)])
        found.append(counts)
    return found
