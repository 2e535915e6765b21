"""The open loop of one simulated system: requests wait in a queue, and get their tokens with those that run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.console import PointProgress
from experiments.measure.schedule import Pass, Schedule
from experiments.point.point import Point
from experiments.results.request_rows import Served, num_good
from experiments.routers.base import FloatArray
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.model_work import TracedModel
from experiments.simulator.routing import Routing
from harmoeny.placement import IntArray


class OpenLoop:
    """Serves the requests of every rate with one system, on a virtual clock."""

    def __init__(self, point: Point, name: str, batch_size: int, traced: TracedModel, routing: Routing) -> None:
        """Prepare the requests.

        Args:
            point: the point.
            name: the system's.
            batch_size: requests that a rank may have at a time.
            traced: the model's work by batch size.
            routing: of the point's batches.
        """
        options = point.options
        self._options, self._requests, self._name, self._batch_size = options, options.requests, name, batch_size
        self._traced, self._num_steps = traced, options.requests.output_tokens - 1
        self._routing = routing

    def run(self, make_system: Callable[[], SimulatedSystem], progress: PointProgress) -> list[Served]:
        """Serve the requests of every rate, up to the first at which too few keep the limits.

        Args:
            make_system: makes the system, which has seen nothing.
            progress: told of every round.
        """
        served: list[Served] = []
        default = 2 * self._options.world_size * self._options.batch_size
        for number, rate in enumerate(self._requests.rates()):
            if number:
                progress.expect(self._options.rounds)
            system, here = make_system(), []
            for index in range(self._options.rounds):
                system.begin_round("open", index)
                times = self._requests.times(self._options.seed, index, default, rate)
                here += self._serve(system, index, times, rate)
                progress.advance()
            served += here
            slo = self._options.slo
            if self._requests.rate_step and num_good(here, self._name, slo.limits) < slo.share * len(here):
                break
        return served

    def _serve(self, system: SimulatedSystem, index: int, arrivals_s: FloatArray, rate: float) -> list[Served]:
        """Serve a round's requests (float64 ``[num_requests]``, ascending)."""
        world_size = self._options.world_size
        schedule = Schedule(len(arrivals_s), world_size, self._batch_size, self._requests.output_tokens)
        tokens_s: list[list[float]] = [[] for _ in arrivals_s]
        starts: list[tuple[int, float]] = [(0, 0.0)] * len(arrivals_s)
        now_s, number = 0.0, 0
        while not schedule.done:
            if schedule.idle:
                now_s = max(now_s, float(arrivals_s[schedule.num_taken]))
            todo = schedule.next(int(np.searchsorted(arrivals_s, now_s, side="right")))
            end_s = self._execute(system, index, todo, now_s)
            for rank, requests in enumerate(todo.requests):
                for request in requests:
                    if todo.prefill:
                        starts[request] = (number, now_s)
                    tokens_s[request].append(float(end_s[rank]))
            now_s, number = float(end_s.max()), number + 1
        system.finish()
        return [
            Served(
                system=self._name,
                round=index,
                batch=starts[request][0],
                request=request,
                rank=request % world_size,
                input_tokens=self._options.seq_len,
                arrival_s=float(arrivals_s[request]),
                start_s=starts[request][1],
                first_token_s=first_s,
                later_s=later_s,
                rate_per_s=rate,
            )
            for request, (first_s, *later_s) in enumerate(tokens_s)
        ]

    def _execute(self, system: SimulatedSystem, index: int, todo: Pass, now_s: float) -> FloatArray:
        """Return float64 ``[world_size]``, when every rank has the tokens of a pass."""
        world_size = len(todo.requests)
        # All ranks take part in a layer, so the one with the most sequences decides how long the rest takes.
        most = max(map(len, todo.requests))
        work = self._traced.work(most) if todo.prefill else self._traced.decode_work(most, self._num_steps)
        system.resize(work)
        counts = [self._count(index, rank, todo, work.num_experts) for rank in range(world_size)]
        end_s, _ = system.forward([np.stack(ranks) for ranks in zip(*counts, strict=True)], np.full(world_size, now_s))
        return end_s

    def _count(self, index: int, rank: int, todo: Pass, num_experts: int) -> list[IntArray]:
        """Return int64 ``[num_experts]`` per MoE layer, one rank's assignments in a pass."""
        whole = self._traced.work(self._batch_size)
        rows = np.array(todo.requests[rank], dtype=np.int64) % (self._batch_size * self._options.world_size)
        if todo.prefill:
            prompts = self._routing.sequences(whole, index, self._batch_size)
            return [layer[rows].sum(axis=0) for layer in prompts]
        step_work = self._traced.decode_work(self._batch_size, self._num_steps)
        steps = np.array(todo.steps[rank], dtype=np.int64) - 1
        layers = self._routing.steps(step_work, index, self._batch_size, self._num_steps)
        return [np.bincount(layer[steps, rows].ravel() + 1, minlength=num_experts + 1)[1:] for layer in layers]
