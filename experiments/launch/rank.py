"""One rank of one point: what it does, step by step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from experiments.console import PointProgress, say
from experiments.launch.join import join
from experiments.measure.bench import Bench
from experiments.measure.check import check_systems
from experiments.measure.extra_loops import measure_extra_loops, num_extra_passes
from experiments.measure.measured import Measured, environment_fields, failed_systems, write_results
from experiments.measure.record_routing import record_routing
from experiments.measure.rounds import run_rounds
from experiments.point.point import Point
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title
from experiments.text.tokens import TokenFile
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.windows import PeerLostError

#: How long a rank that lost a peer waits before it reports that, so that the launcher sees the peer's own end first.
_PEER_LOST_DELAY_S = 1.5


def run_rank(
    point: Point, tokens: TokenFile, folder: RunFolder, *, on_timeout: Callable[[], object] = lambda: None
) -> None:
    """Measure a point as one of its ranks; rank 0 writes the results.

    Args:
        point: the point.
        tokens: its text.
        folder: the run's, which has begun.
        on_timeout: called where this rank waited for another until its time was up.
    """
    try:
        device = join(point.device_type, point.options.timeout_s, ranks_per_gpu=point.options.ranks_per_gpu)
        with torch.inference_mode():
            _run(point, tokens, folder, Communicator(device, timeout_s=point.options.timeout_s))
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


def _run(point: Point, tokens: TokenFile, folder: RunFolder, comm: Communicator) -> None:
    if comm.rank == 0:
        folder.describe(environment_fields(point, comm, tokens))
    with PointProgress(point_title(point.run_id), _num_passes(point), enabled=comm.rank == 0) as progress:
        bench = Bench.set_up(point, tokens, comm, progress)
        checks = check_systems(bench)
        if comm.rank == 0 and bench.comm.remark:
            say(f"{point_title(point.run_id)}: exchange=auto is collective: {bench.comm.remark}")
        _leave_out(failed_systems(checks), bench)
        if not bench.systems:
            if comm.rank == 0:
                folder.describe({"checks": checks, "failed_systems": failed_systems(checks)})
                folder.fail("no system passed its check")
            bench.close()
            return
        iterations = run_rounds(bench)
        extra = measure_extra_loops(bench)
        bench.clock.check()
    record_routing(bench)
    write_results(bench, Measured(checks, iterations, extra), folder)
    bench.close()


def _leave_out(failed: Mapping[str, str], bench: Bench) -> None:
    """Go on without the systems that failed their check, and say so."""
    bench.systems = [system for system in bench.systems if system.name not in failed]
    if bench.comm.rank == 0:
        for name, reason in failed.items():
            say(f"error: {point_title(bench.point.run_id)}: {name} failed its check and is left out: {reason}")


def _num_passes(point: Point) -> int:
    """Return how often the progress advances: checks, rounds and extra loops of all systems."""
    options = point.options
    return len(point.systems) * (1 + options.warmup_rounds + options.rounds) + num_extra_passes(point)
