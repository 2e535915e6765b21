"""The measurement: systems interleaved round by round on the same inputs, routing and weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from experiments.console import PointProgress
from experiments.measure.batch import Batch
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.layer_rows import RankIteration, layer_row
from harmoeny.models.base import MoEModel
from harmoeny.runtime.device import Device
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System


def run_rounds(
    model: MoEModel,
    engine: ExpertParallel,
    systems: Sequence[System],
    batches: Sequence[Batch],
    *,
    warmup_rounds: int,
    clock_offset_s: float,
    progress: PointProgress,
) -> list[RankIteration]:
    """Measure every system on every batch, one batch a round.

    Args:
        model: the model, attached to ``engine``.
        engine: executes its MoE layers.
        systems: the systems to compare, already checked.
        batches: one per measured round; warm-up rounds reuse the first.
        warmup_rounds: rounds whose times are thrown away.
        clock_offset_s: seconds from this rank's clock to rank 0's.
        progress: told of every forward pass.
    """
    records: list[RankIteration] = []
    gc.collect()
    gc.freeze()  # a collection that looks at every imported library again takes a quarter of a second
    for round_index in range(-warmup_rounds, len(batches)):
        batch = batches[max(round_index, 0)]
        progress.step("warm-up" if round_index < 0 else f"round {round_index + 1} of {len(batches)}")
        for system in in_turn(systems, round_index):
            engine.use(system)
            model.context.tape.pin(batch.expert_ids)
            with collector_paused():
                start_s, end_s = timed_forward(model, engine, batch)
                engine.finish()
                drained_s = time.perf_counter()
            if round_index >= 0:
                rank = engine.comm.rank
                origin_s = start_s + clock_offset_s
                records.append(
                    RankIteration(
                        system=system.name,
                        round=round_index,
                        iteration=len(records),
                        rank=rank,
                        start_s=origin_s,
                        end_s=end_s + clock_offset_s,
                        drain_s=drained_s - end_s,
                        num_sequences=batch.input_ids.shape[0],
                        input_tokens=batch.input_ids.numel(),
                        layers=[layer_row(times, rank, origin_s) for times in engine.recorder.collect()],
                    )
                )
            progress.advance()
    return records


def timed_forward(model: MoEModel, engine: ExpertParallel, batch: Batch) -> tuple[float, float]:
    """Run the model on a batch whose routing is pinned; return when this rank left the barrier and when it was done."""
    engine.comm.barrier()
    engine.recorder.begin_iteration()
    start = time.perf_counter()
    model.forward(batch.input_ids)
    # The first token is out when the computation is done; residents may still be restored.
    Device.of(engine.comm.device).synchronize_compute()
    return start, time.perf_counter()
