"""The measurement: points and their systems interleaved round by round, on the same weights and texts."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.measure.batch import Batch
from experiments.measure.bench import Bench, Rig
from experiments.measure.goal import Goal
from experiments.measure.records import Records
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.layer_rows import RankIteration, layer_row
from experiments.results.yardstick_rows import YardstickTime
from harmoeny.runtime.device import Device
from harmoeny.runtime.layer.system import System


def run_rounds(rig: Rig, benches: Sequence[Bench], goal: Goal) -> list[Records]:
    """Measure every system of every point on every batch, one batch a round.

    Warm-up rounds take a batch of their own and are thrown away, with all that systems learned from them.

    Args:
        rig: of the group.
        benches: its points, at least one.
        goal: says when there are enough rounds.

    Returns:
        By point, what this rank saw.
    """
    gc.collect()
    gc.freeze()  # a collection that looks at every imported library again takes a quarter of a second
    for round_index in range(-benches[0].point.options.warmup_rounds, 0):
        rig.progress.say("warm-up")
        _run_round(rig, benches, round_index, [Records() for _ in benches])
    for bench in benches:
        bench.begin_loop()
    records = [Records() for _ in benches]
    num_rounds = 0
    while not goal.is_reached(num_rounds, records):
        rig.progress.say(goal.title(num_rounds))
        if num_rounds >= benches[0].point.options.rounds:
            rig.progress.expect(sum(len(bench.systems) for bench in benches))
        _run_round(rig, benches, num_rounds, records)
        num_rounds += 1
    return records


def _run_round(rig: Rig, benches: Sequence[Bench], round_index: int, records: Sequence[Records]) -> None:
    """Measure all points in one round, and the machine's yardstick between them."""
    most_rounds = benches[0].point.most_rounds
    rig.begin_round()
    before = rig.yardstick.measure()
    for bench, seen in in_turn(list(zip(benches, records, strict=True)), round_index, most_rounds):
        batch = bench.batch(round_index)
        for system in in_turn(bench.systems, round_index, most_rounds):
            timed = _iterate(bench, system, batch)
            seen.iterations.append(_record(bench, system, batch, timed, round_index, len(seen.iterations)))
            rig.progress.advance()
        after = rig.yardstick.measure()
        ends = enumerate((before, after))
        seen.yardstick += [YardstickTime(round_index, end, rig.comm.rank, *taken) for end, taken in ends]
        before = after


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
