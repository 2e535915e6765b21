"""One rank of a group of points: what it does, step by step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from experiments.console import PointProgress, say
from experiments.launch.join import join
from experiments.measure.bench import Bench, Rig
from experiments.measure.check import check_systems
from experiments.measure.extra_loops import measure_extra_loops, num_extra_passes
from experiments.measure.goal import Goal
from experiments.measure.measured import (
    FAILED_AND_LEFT_OUT,
    NONE_PASSED,
    Measured,
    environment_fields,
    failed_systems,
    write_results,
)
from experiments.measure.record_routing import record_routing
from experiments.measure.rounds import run_rounds
from experiments.point.point import Point
from experiments.results.begun import BegunRun
from experiments.results.group import group_title
from experiments.results.sweep import point_title
from experiments.text.tokens import TokenFile
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.windows import PeerLostError

#: How long a rank that lost a peer waits before it reports that, so that the launcher sees the peer's own end first.
_PEER_LOST_DELAY_S = 1.5


def run_rank(runs: Sequence[BegunRun], tokens: TokenFile, *, on_timeout: Callable[[], object] = lambda: None) -> None:
    """Measure a group of points as one of its ranks; rank 0 writes the results.

    Args:
        runs: of the group's points.
        tokens: their text.
        on_timeout: called where this rank waited for another until its time was up.
    """
    point = runs[0].point
    try:
        device = join(
            point.device_type,
            point.options.timeout_s,
            ranks_per_gpu=point.options.ranks_per_gpu,
            host_threads=point.options.host_threads,
        )
        with torch.inference_mode():
            _run(runs, tokens, Communicator(device, timeout_s=point.options.timeout_s))
    except (dist.DistError, RuntimeError) as error:
        if point.options.world_size > 1 and is_peer_lost(error):
            if is_timeout(error):
                on_timeout()
            time.sleep(_PEER_LOST_DELAY_S)
        raise


def is_peer_lost(error: BaseException) -> bool:
    """Tell whether an error says that another rank is gone or cannot be reached, rather than that this one failed."""
    if isinstance(error, (dist.DistError, PeerLostError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed by peer", "connection reset", "gloo", "nccl"))


def is_timeout(error: BaseException) -> bool:
    """Tell whether the error of a lost rank says that it gave no answer, rather than that its connection ended."""
    return re.search(r"timed? ?out", str(error).lower()) is not None


def _run(runs: Sequence[BegunRun], tokens: TokenFile, comm: Communicator) -> None:
    points = [run.point for run in runs]
    if comm.rank == 0:
        for run in runs:
            run.folder.describe(environment_fields(run.point, comm, tokens))
    num_passes = sum(_num_passes(point) for point in points)
    with PointProgress(group_title(points), num_passes, enabled=comm.rank == 0) as progress:
        rig = Rig.set_up(points[0], comm, progress)
        progress.say("preparing the systems")
        benches = [Bench.set_up(rig, point, tokens) for point in points]
        if comm.rank == 0 and rig.comm.remark:
            say(f"{group_title(points)}: exchange=auto is collective: {rig.comm.remark}")
        checks = [check_systems(bench, _at(bench.point, points)) for bench in benches]
        passed = [i for i, bench in enumerate(benches) if _leave_out(bench, checks[i], runs[i])]
        if not passed:
            rig.close()
            return
        goal = Goal(rig, [benches[i] for i in passed])
        records = run_rounds(rig, goal.benches, goal)
        extra = [measure_extra_loops(bench) for bench in goal.benches]
        rig.clock.check()
    if comm.rank == 0 and goal.reached:
        say(f"{group_title(points)}: {goal.reached.text}")
    for i, own, more in zip(passed, records, extra, strict=True):
        record_routing(benches[i])
        write_results(benches[i], Measured(checks[i], own, goal.reached, more), runs[i].folder)
    rig.close()


def _at(point: Point, group: Sequence[Point]) -> str:
    return "" if len(group) == 1 else f" at {point_title(point.run_id)}"


def _leave_out(bench: Bench, checks: Mapping[str, Mapping[str, Any]], run: BegunRun) -> bool:
    """Go on without the systems that failed their check at a point, and say so; tell whether any is left there."""
    failed, title = failed_systems(checks), point_title(run.point.run_id)
    bench.systems = [system for system in bench.systems if system.name not in failed]
    if bench.comm.rank == 0:
        for name, reason in failed.items():
            say(f"error: {title}: {name} {FAILED_AND_LEFT_OUT}: {reason}")
        if not bench.systems:
            run.folder.describe({"checks": checks, "failed_systems": failed})
            run.folder.fail(NONE_PASSED)
    return bool(bench.systems)


def _num_passes(point: Point) -> int:
    """Return how often the progress advances: checks, rounds and extra loops of all systems."""
    options = point.options
    return len(point.systems) * (1 + options.warmup_rounds + options.rounds) + num_extra_passes(point)
