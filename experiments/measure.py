"""The measurement: systems interleaved round by round on the same inputs, routing and weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.check import dense_forward
from experiments.config import Point
from experiments.datasets.tokens import TokenFile
from experiments.progress import PointProgress
from experiments.records import RankIteration, layer_row
from experiments.routers.base import CALIBRATION_BATCH, RoutingRequest
from experiments.turns import collector_paused, in_turn
from harmoeny.models.base import MoEModel
from harmoeny.runtime.engine import ExpertParallel, System


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch with its routing.

    Attributes:
        input_ids: int64 ``[batch_size, seq_len]``.
        expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer.
    """

    input_ids: Tensor
    expert_ids: list[Tensor]


def make_batch(point: Point, model: MoEModel, tokens: TokenFile, index: int, rank: int, device: torch.device) -> Batch:
    """Read a batch and decide its routing, so that every system gets the same of both."""
    batch_size, seq_len = point["batch_size"], point["seq_len"]
    text_index = index if index < CALIBRATION_BATCH else point["rounds"] + index - CALIBRATION_BATCH
    ids = tokens.batch(
        index=text_index, rank=rank, world_size=point["world_size"], batch_size=batch_size, seq_len=seq_len
    )
    input_ids = torch.from_numpy(ids).to(device)
    if point.router.from_model:
        model.context.tape.pin(None)
        dense_forward(model, input_ids)
        return Batch(input_ids, model.context.tape.recorded)
    requests = [
        RoutingRequest(
            num_tokens, model.num_experts, model.top_k, index, layer, rank, point["seed"], point["world_size"]
        )
        for layer, num_tokens in enumerate(model.layer_tokens(batch_size, seq_len))
    ]
    return Batch(input_ids, [torch.from_numpy(point.router.assign(r)).to(device) for r in requests])


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
    if engine.comm.device.type == "cuda":
        # The first token is out when the compute stream is done; copy streams may still restore residents.
        torch.cuda.current_stream(engine.comm.device).synchronize()
    return start, time.perf_counter()
