"""``backend=simulator``: runs a point without ranks and writes what ranks would have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from experiments.console import PointProgress, say
from experiments.measure.extra_loops import num_extra_passes
from experiments.point.point import Point
from experiments.point.simulator_options import SoftwareCost
from experiments.results.begun import BegunRun
from experiments.results.layer_rows import (
    Platform,
    RankIteration,
    iteration_frame,
    layer_frame,
    routing_frame,
)
from experiments.results.manifest import model_fields, options_of
from experiments.results.request_rows import Decoded, Served, decode_frame, request_frame
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title
from experiments.routers.base import CALIBRATION_BATCH
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.device_memory import OutOfMemoryError
from experiments.simulator.flows import plan_fits
from experiments.simulator.jitter import Jitter
from experiments.simulator.loops import SystemLoops
from experiments.simulator.model_work import ModelWork, TracedModel
from experiments.simulator.plan_times import PlanTimes
from experiments.simulator.routing import Routing, with_shared_counts
from experiments.simulator.topology import Topology
from experiments.text.tokens import TokenFile
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.shared import make_plan
from harmoeny.trace import RoutingTrace
from results_schema.manifest import SIMULATOR
from results_schema.tables import DECODE, ITERATIONS, LAYERS, REQUESTS, ROUTING, Table


@dataclass
class Simulation:
    """What a simulated point gave.

    Attributes:
        iterations: as the ranks of a real run would have seen them.
        served: requests of the open loop, likewise.
        decoded: batches of the decode phase, likewise.
        work: the model, for the experiment's batch size, or another if no system has that.
        routed: int64 ``[num_layers, num_experts]`` per round, assignments of batches of that size over all ranks.
        notes: by system, what the manifest says of it.
        out_of_memory: by system that does not fit, which rank lacks how much.
        failed: by system whose plans are wrong, where and how.
    """

    iterations: list[RankIteration]
    served: list[Served]
    decoded: list[Decoded]
    work: ModelWork
    routed: list[IntArray]
    notes: dict[str, dict[str, Any]]
    out_of_memory: dict[str, str]
    failed: dict[str, str]

    def model_fields(self, point: Point) -> dict[str, Any]:
        """Return what the manifest says of the model."""
        work = self.work
        num_moe_layers = len(work.layer_tokens)
        return {
            "scope": work.scope,
            "model": model_fields(
                point,
                num_moe_layers=num_moe_layers,
                num_experts=work.num_experts,
                top_k=work.top_k,
                expert_bytes=work.expert_bytes,
                store_bytes=work.expert_bytes * work.all_experts * num_moe_layers,
            ),
        }

    def tables(self, point: Point) -> dict[Table, pd.DataFrame]:
        """Return the result tables."""
        platform = Platform(Simulator.name, point.hardware.name, "simulated")
        tables = {
            LAYERS: layer_frame(self.iterations, platform),
            ITERATIONS: iteration_frame(self.iterations, platform, self.work.scope),
            ROUTING: routing_frame(self.routed, self.work.stacks),
        }
        if self.served:
            tables[REQUESTS] = request_frame(self.iterations, self.served, platform)
        if self.decoded:
            tables[DECODE] = decode_frame(self.decoded, platform)
        return tables


class Simulator:
    """Predicts a point for hardware that is described, without ranks."""

    name: ClassVar[str] = SIMULATOR
    simulated: ClassVar[bool] = True

    def check(self, point: Point) -> None:
        """Refuse hardware that is not described well enough, and options that nobody would read.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        for name in ("expert_flops_per_s", "host_link_bytes_per_s"):
            if getattr(point.hardware, name) is None:
                raise ValueError(
                    f"hardware.{name}: null, must be set for backend=simulator: choose a hardware= that has it, "
                    "or calibrate this machine (python -m scripts.calibrate)"
                )
        Topology(point.hardware, point.options.world_size)
        for name in point.systems:
            _batch_size(point, name)
        if point.router.from_model and point.simulator.batch_size:
            raise ValueError(
                "simulator.batch_size: must be empty with router=model, whose routing is of one batch size"
            )

    def check_host(self, point: Point) -> None:
        """Accept every host: nothing of it matters."""

    def run(self, runs: Sequence[BegunRun], tokens: TokenFile | None) -> None:
        """Simulate points and write their result files; systems that do not fit in memory are in the manifest alone.

        Raises:
            OutOfMemoryError: not one system fits.
        """
        for run in runs:
            self._run_point(run.point, tokens, run.folder)

    def _run_point(self, point: Point, tokens: TokenFile | None, folder: RunFolder) -> None:
        folder.describe(
            {
                "backend": self.name,
                "device": point.hardware.name,
                "hardware_source": point.hardware.source,
                "dataset": {"name": point.dataset_name, "recorded_tokens": point.router.recorded_tokens()},
            }
        )
        num_rounds = len(point.systems) * point.options.rounds + num_extra_passes(point)
        with PointProgress(point_title(point.run_id), num_rounds, enabled=True) as progress:
            simulation = simulate(point, tokens, progress)
        out_of_memory = simulation.out_of_memory
        failed = simulation.failed
        for name, reason in failed.items():
            say(f"error: {point_title(point.run_id)}: {name} failed its check and is left out: {reason}")
        fields = {"out_of_memory": out_of_memory, "failed_systems": failed, "inputs": point.inputs()}
        fields |= simulation.model_fields(point)
        folder.describe(fields, simulation.notes, left_out=[*out_of_memory, *failed])
        if not simulation.iterations and failed:
            folder.fail("no system passed its check and fits in memory")
            return
        if not simulation.iterations:
            raise OutOfMemoryError("; ".join(f"{name}: {text}" for name, text in out_of_memory.items()))
        folder.write_tables(simulation.tables(point))
        folder.finish()
        for name, reason in out_of_memory.items():
            say(f"{point_title(point.run_id)}: {name} does not fit: {reason}")


def simulate(point: Point, tokens: TokenFile | None = None, progress: PointProgress | None = None) -> Simulation:
    """Predict a point.

    Args:
        point: the point.
        tokens: its text; only the model's own routing needs it.
        progress: told of every system and round.
    """
    systems = _Systems(point, tokens, progress or PointProgress("", 0, enabled=False))
    for name in point.systems:
        systems.simulate(name)
    return systems.simulation()


class _Systems:
    """Simulates a point's systems one after another and collects what they gave."""

    def __init__(self, point: Point, tokens: TokenFile | None, progress: PointProgress) -> None:
        self._point, self._progress = point, progress
        self._routing = Routing(point, tokens)
        self._topology = Topology(point.hardware, point.options.world_size)
        self._traced: dict[str | None, TracedModel] = {}
        self._work: ModelWork | None = None
        self._iterations: list[RankIteration] = []
        self._served: list[Served] = []
        self._decoded: list[Decoded] = []
        self._notes: dict[str, dict[str, Any]] = {}
        self._out_of_memory: dict[str, str] = {}
        self._failed: dict[str, str] = {}

    def simulate(self, name: str) -> None:
        """Simulate one system, or note why it has no numbers."""
        point, policy = self._point, self._point.systems[name]
        self._progress.say(f"simulating {name} ({list(point.systems).index(name) + 1} of {len(point.systems)})")
        batch_size = _batch_size(point, name)
        software = point.simulator.software.get(name, SoftwareCost())
        traced = self._model(software.dtype)
        self._work = work = traced.work(batch_size)
        cost = CostModel(point.hardware, self._topology, work, software)
        fitted = _fit(policy.calibrated(cost.expert), self._routing, work, point.options.world_size)
        if problem := _plan_problem(fitted, work, self._routing.counts(work, 0, batch_size)):
            self._failed[name] = problem
            return
        plan_times = PlanTimes.of(fitted) if software.plan_s is None else PlanTimes()
        jitter = Jitter(point.hardware, point.options.world_size, point.options.seed)
        make_system = partial(SimulatedSystem, fitted, cost, point.hardware.device_memory_bytes, plan_times, jitter)
        try:
            self._run_loops(SystemLoops(point, name, batch_size, make_system, traced, self._routing, self._progress))
            self._notes[name] = {
                "exact": policy.exact and software.capacity_limit is None,
                "device_expert_bytes": int(make_system().held_bytes[0]) - work.dense_bytes,
                "threshold": getattr(fitted, "threshold", None),
                "options": options_of(point, name, fitted),
            }
        except OutOfMemoryError as error:
            self._out_of_memory[name] = str(error)
        plan_times.save()

    def simulation(self) -> Simulation:
        """Return what all systems gave."""
        point, work = self._point, self._work
        assert work is not None, "a point has a system"
        batch_size = _batch_size(point, next(reversed(point.systems)))
        if point.options.batch_size in {_batch_size(point, name) for name in point.systems}:
            batch_size = point.options.batch_size
            work = self._model(None).work(batch_size)
        routed = [
            np.stack([counts.sum(axis=0) for counts in self._routing.counts(work, index, batch_size)])
            for index in range(point.options.rounds)
        ]
        return Simulation(
            self._iterations, self._served, self._decoded, work, routed, self._notes, self._out_of_memory, self._failed
        )

    def _run_loops(self, loops: SystemLoops) -> None:
        """Run what the point asks for; a system that does not fit in one of its loops has rows of none."""
        options = self._point.options
        closed = loops.closed(len(self._iterations) // options.world_size)
        served = loops.served() if options.requests.open_loop else []
        decoded = loops.decoded() if options.decode_tokens else []
        self._iterations += closed
        self._served += served
        self._decoded += decoded

    def _model(self, dtype: str | None) -> TracedModel:
        """Return the point's model in a type; None: its own."""
        if dtype not in self._traced:
            model = self._point.model if dtype is None else replace(self._point.model, dtype=dtype)
            self._traced[dtype] = TracedModel(model, self._point.options.seq_len)
        return self._traced[dtype]


def _plan_problem(policy: Policy, work: ModelWork, counts: Sequence[IntArray]) -> str | None:
    """Say where a policy's plan of a batch breaks what every plan must keep; nothing of a plan too large to be made.

    Args:
        policy: the policy.
        work: the model.
        counts: int64 ``[world_size, num_experts]`` per MoE layer, without shared experts.
    """
    for layer, routed in enumerate(counts):
        if not plan_fits(routed):
            return None
        placement = policy.place(layer, work.num_experts, len(routed)).with_shared(work.num_shared)
        layer_counts = with_shared_counts(routed, work)
        try:
            make_plan(policy, layer_counts, placement).validate(layer_counts, placement, exact=policy.exact)
        except ValueError as error:
            return f"MoE layer {layer}: {error}"
    return None


def _batch_size(point: Point, system: str) -> int:
    """Return a system's sequences per rank."""
    skew = getattr(point.router, "skew", None)
    return point.simulator.batch_size_of(system, point.options.batch_size, skew)


def _fit(policy: Policy, routing: Routing, work: ModelWork, world_size: int) -> Policy:
    """Show a policy the routing of its calibration batches, as the real runtime does."""
    if policy.calibration_batches == 0:
        return policy
    batches = [routing.expert_ids(work, CALIBRATION_BATCH + i) for i in range(policy.calibration_batches)]
    trace = RoutingTrace([np.concatenate(layer) for layer in zip(*batches, strict=True)], work.stacks)
    return policy.fitted(trace, work.num_experts, world_size)
