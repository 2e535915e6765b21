"""What a run measures beside the closed loop, if asked: an open loop of requests, and a decode phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.console import PointProgress
from experiments.measure.batch import Batch
from experiments.measure.decode import DecodeBatch, Decoded, check_decode, decode_rounds, make_decode_batch
from experiments.measure.serving import Served, serve_rounds
from experiments.point.point import Point
from harmoeny.models.base import MoEModel
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System


@dataclass(frozen=True)
class Extra:
    """What one rank saw.

    Attributes:
        served: requests of the open loop.
        decoded: batches of the decode phase.
        checks: per system what its check has beside that of the closed loop.
    """

    served: list[Served] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)


def num_steps(point: Point) -> int:
    """Return how often the phases tell of their progress."""
    phases = int(point.options.requests.open_loop) + int(point.options.decode_tokens > 0)
    return phases * len(point.systems) * point.options.rounds


def measure_phases(
    point: Point,
    model: MoEModel,
    engine: ExpertParallel,
    systems: Sequence[System],
    batches: Sequence[Batch],
    clock_offset_s: float,
    progress: PointProgress,
) -> Extra:
    """Measure what the point asks for; all ranks together, all systems interleaved on the same requests."""
    extra = Extra()
    shared: dict[str, Any] = {"clock_offset_s": clock_offset_s, "progress": progress}
    if point.options.requests.open_loop:
        default = 2 * point.options.world_size * point.options.batch_size
        arrivals_s = [point.options.requests.times(point.options.seed, i, default) for i in range(len(batches))]
        extra.served.extend(serve_rounds(model, engine, systems, batches, arrivals_s, **shared))
    if point.options.decode_tokens:
        progress.step("decoding with the dense model")
        rank = engine.comm.rank
        prompts: list[DecodeBatch] = [make_decode_batch(point, model, b, i, rank) for i, b in enumerate(batches)]
        for system in systems:
            if system.policy.exact:
                extra.checks[system.name] = {"decode_error": check_decode(model, engine, system, prompts[0])}
        extra.decoded.extend(decode_rounds(model, engine, systems, prompts, **shared))
    return extra
