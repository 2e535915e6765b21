"""The measurement: systems interleaved round by round on the same inputs, routing and weights."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from experiments.measure.batch import Batch
from experiments.measure.bench import Bench
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.layer_rows import RankIteration, layer_row
from harmoeny.runtime.device import Device
from harmoeny.runtime.layer.system import System


def run_rounds(bench: Bench) -> list[RankIteration]:
    """Measure every system on every batch, one batch a round.

    Warm-up rounds take a batch of their own and are thrown away, with all that systems learned from them.
    """
    records: list[RankIteration] = []
    gc.collect()
    gc.freeze()  # a collection that looks at every imported library again takes a quarter of a second
    for round_index in range(-bench.point.options.warmup_rounds, len(bench.batches)):
        batch = bench.batches[round_index] if round_index >= 0 else bench.warm_up
        if round_index == 0:
            bench.begin_loop()
        bench.begin_round()
        bench.progress.say("warm-up" if round_index < 0 else f"round {round_index + 1} of {len(bench.batches)}")
        for system in in_turn(bench.systems, round_index):
            timed = _iterate(bench, system, batch)
            if round_index >= 0:
                records.append(_record(bench, system, batch, timed, round_index, iteration=len(records)))
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
    origin_s = timed.start_s + bench.clock_offset_s
    return RankIteration(
        system=system.name,
        round=round_index,
        iteration=iteration,
        rank=rank,
        start_s=origin_s,
        end_s=timed.end_s + bench.clock_offset_s,
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
