"""The loops of one simulated system: the batches of the closed loop, an open loop of requests, and a decode phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.console import PointProgress
from experiments.point.point import Point
from experiments.results.layer_rows import RankIteration
from experiments.results.request_rows import Decoded, Served, decode_totals
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.model_work import TracedModel
from experiments.simulator.open_loop import OpenLoop
from experiments.simulator.routing import Routing


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
        """Serve requests as they arrive, at every rate; a round's are the sequences of its batch, again and again."""
        loop = OpenLoop(self.point, self.name, self.batch_size, self.traced, self.routing)
        return loop.run(self.make_system, self.progress)

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
