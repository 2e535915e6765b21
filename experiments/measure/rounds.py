"""The measurement: points and their systems interleaved round by round, on the same weights and texts."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.measure.batch import Batch
from experiments.measure.bench import Bench, Rig
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.layer_rows import RankIteration, layer_row
from experiments.results.yardstick_rows import YardstickTime
from harmoeny.runtime.device import Device
from harmoeny.runtime.layer.system import System


@dataclass
class Records:
    """What one rank saw of one point in the measured rounds.

    Attributes:
        iterations: forward passes.
        yardstick: what the machine's yardstick took before and after the point's systems.
    """

    iterations: list[RankIteration] = field(default_factory=list)
    yardstick: list[YardstickTime] = field(default_factory=list)


def run_rounds(rig: Rig, benches: Sequence[Bench]) -> list[Records]:
    """Measure every system of every point on every batch, one batch a round.

    Warm-up rounds take a batch of their own and are thrown away, with all that systems learned from them.

    Args:
        rig: of the group.
        benches: its points, at least one.

    Returns:
        By point, what this rank saw.
    """
    records = [Records() for _ in benches]
    gc.collect()
    gc.freeze()  # a collection that looks at every imported library again takes a quarter of a second
    num_rounds = len(benches[0].batches)
    for round_index in range(-benches[0].point.options.warmup_rounds, num_rounds):
        if round_index == 0:
            for bench in benches:
                bench.begin_loop()
        rig.begin_round()
        rig.progress.say("warm-up" if round_index < 0 else f"round {round_index + 1} of {num_rounds}")
        before = rig.yardstick.measure()
        for bench, seen in in_turn(list(zip(benches, records, strict=True)), round_index, num_rounds):
            seen.iterations += _measure_point(bench, round_index, first_iteration=len(seen.iterations))
            after = rig.yardstick.measure()
            if round_index >= 0:
                ends = enumerate((before, after))
                seen.yardstick += [YardstickTime(round_index, end, rig.comm.rank, *taken) for end, taken in ends]
            before = after
    return records


def _measure_point(bench: Bench, round_index: int, first_iteration: int) -> list[RankIteration]:
    """Measure one point's systems in one round; return nothing of a warm-up round."""
    records: list[RankIteration] = []
    batch = bench.batches[round_index] if round_index >= 0 else bench.warm_up
    for system in in_turn(bench.systems, round_index, len(bench.batches)):
        timed = _iterate(bench, system, batch)
        if round_index >= 0:
            records.append(_record(bench, system, batch, timed, round_index, first_iteration + len(records)))
        bench.progress.advance()
    return records


@dataclass(frozen=True)
class Timed:
    """When one forward pass happened on this rank's clock, in seconds.

    Attributes:
        start_s: it left the barrier.
        end_s: its first output token was out.
        drained_s: the copies that the pass left behind were complete.
    """

    start_s: float
    end_s: float
    drained_s: float


def _iterate(bench: Bench, system: System, batch: Batch) -> Timed:
    """Let a system run the model once, and wait for what it leaves behind."""
    bench.engine.use(system)
    with collector_paused():
        start_s, end_s = timed_forward(bench, batch)
        bench.engine.finish()
        return Timed(start_s, end_s, time.perf_counter())


def _record(
    bench: Bench, system: System, batch: Batch, timed: Timed, round_index: int, iteration: int
) -> RankIteration:
    rank = bench.comm.rank
    offset_s = bench.rig.clock_offset_s
    origin_s = timed.start_s + offset_s
    return RankIteration(
        system=system.name,
        round=round_index,
        iteration=iteration,
        rank=rank,
        start_s=origin_s,
        end_s=timed.end_s + offset_s,
        drain_s=timed.drained_s - timed.end_s,
        num_sequences=batch.input_ids.shape[0],
        input_tokens=batch.input_ids.numel(),
        layers=[layer_row(times, rank, origin_s) for times in bench.engine.recorder.collect()],
    )


def timed_forward(bench: Bench, batch: Batch) -> tuple[float, float]:
    """Run the model on a batch with its routing; return when this rank left the barrier and when it was done, in s."""
    bench.model.context.tape.pin(batch.expert_ids)
    bench.comm.barrier()
    bench.engine.recorder.begin_iteration()
    start_s = time.perf_counter()
    bench.model.forward(batch.input_ids)
    # The first token is out when the compute stream is done; copy streams may still restore residents.
    Device.of(bench.comm.device).synchronize_compute()
    return start_s, time.perf_counter()
