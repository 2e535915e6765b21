"""The decode phase: after the first token one token per step and sequence, with the keys and values kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.console import PointProgress
from experiments.measure.batch import Batch
from experiments.measure.check import TOLERANCE, CheckError
from experiments.measure.turns import collector_paused, in_turn
from experiments.point.point import Point
from experiments.routers.base import RoutingRequest
from harmoeny.models.base import MoEModel
from harmoeny.runtime.device import Device
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System


@dataclass(frozen=True)
class DecodeBatch:
    """A batch with the steps that follow it, the same for every system.

    Attributes:
        prompt: the batch.
        tokens: int64 ``[num_steps, batch_size]``, the tokens that the untouched model chooses (greedy), fed to every
            system, so that all compute the same sequences.
        expert_ids: per step and MoE layer int64 ``[batch_size, top_k]``.
        logits: what the untouched model says after the last step, ``[batch_size, vocab_size]``.
    """

    prompt: Batch
    tokens: Tensor
    expert_ids: list[list[Tensor]]
    logits: Tensor


@dataclass(frozen=True)
class Decoded:
    """One measured batch as one rank saw it; times are seconds on the common clock.

    Attributes:
        system: the system.
        round: round of interleaved systems.
        rank: the rank.
        num_sequences: its sequences.
        num_steps: tokens after the first, per sequence.
        first_token_s: when it had its first tokens.
        last_token_s: when it had its last tokens.
    """

    system: str
    round: int
    rank: int
    num_sequences: int
    num_steps: int
    first_token_s: float
    last_token_s: float


def make_decode_batch(point: Point, model: MoEModel, prompt: Batch, index: int, rank: int) -> DecodeBatch:
    """Let the untouched model decode, and keep its tokens and the routing of every step.

    With ``router=model`` the routing is the model's own; other routers decide every step anew, with their shares.
    """
    steps: list[list[Tensor]] = []
    tokens: list[Tensor] = []
    model.context.dense = True
    try:
        model.context.tape.pin(prompt.expert_ids)
        logits, cache = model.prefill(prompt.input_ids)
        for step in range(point.options.decode_tokens):
            tokens.append(logits.argmax(dim=-1))
            pinned = None if point.router.from_model else _assigned(point, model, prompt, index, rank, step)
            model.context.tape.pin(pinned)
            logits = model.decode(tokens[-1], cache)
            steps.append(model.context.tape.recorded if pinned is None else pinned)
    finally:
        model.context.dense = False
    return DecodeBatch(prompt, torch.stack(tokens), steps, logits)


def _assigned(point: Point, model: MoEModel, prompt: Batch, index: int, rank: int, step: int) -> list[Tensor]:
    layers, device = len(model.experts), prompt.input_ids.device
    requests = [
        RoutingRequest(
            len(prompt.input_ids), model.num_experts, model.top_k, index, (step + 1) * layers + layer, rank,
            point.options.seed, point.options.world_size,
        )
        for layer in range(layers)
    ]  # fmt: skip
    return [torch.from_numpy(point.router.assign(request)).to(device) for request in requests]


def check_decode(model: MoEModel, engine: ExpertParallel, system: System, batch: DecodeBatch) -> float:
    """Compare what an exact system says after the last step with the untouched model; all ranks together.

    Returns:
        The largest error relative to the scale of the logits, over all ranks.

    Raises:
        CheckError: the error is larger than the type of number explains.
    """
    engine.use(system)
    logits, _, _ = _decode(model, engine, batch)
    engine.finish()
    error, scale = float((logits - batch.logits).abs().max()), float(batch.logits.abs().max())
    worst = torch.tensor([error, scale], device=engine.comm.device)
    if engine.comm.world_size > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    relative = float(worst[0] / worst[1])
    if not relative <= TOLERANCE[batch.logits.dtype]:
        raise CheckError(f"{system.name}: decode differs from the dense model's by {relative:.3g} of its scale")
    return relative


def decode_rounds(
    model: MoEModel,
    engine: ExpertParallel,
    systems: Sequence[System],
    batches: Sequence[DecodeBatch],
    *,
    clock_offset_s: float,
    progress: PointProgress,
) -> list[Decoded]:
    """Measure the decode phase of every system on every batch, one batch a round; all ranks together.

    Args:
        model: the model, attached to ``engine``.
        engine: executes its MoE layers.
        systems: the systems to compare.
        batches: one per round.
        clock_offset_s: seconds from this rank's clock to rank 0's.
        progress: told of every system's round.
    """
    found = []
    for round_index, batch in enumerate(batches):
        for system in in_turn(systems, round_index):
            progress.step(f"decode, round {round_index + 1} of {len(batches)}")
            engine.use(system)
            with collector_paused():
                _, first_s, last_s = _decode(model, engine, batch)
            engine.finish()
            num_steps, num_sequences = batch.tokens.shape
            times = first_s + clock_offset_s, last_s + clock_offset_s
            found.append(Decoded(system.name, round_index, engine.comm.rank, num_sequences, num_steps, *times))
            progress.advance()
    return found


def _decode(model: MoEModel, engine: ExpertParallel, batch: DecodeBatch) -> tuple[Tensor, float, float]:
    """Return the logits after the last step, and when the first and the last tokens were out."""
    engine.comm.barrier()
    engine.recorder.begin_iteration()
    model.context.tape.pin(batch.prompt.expert_ids)
    logits, cache = model.prefill(batch.prompt.input_ids)
    logits.argmax(dim=-1)
    first_s = _now(engine)
    for tokens, expert_ids in zip(batch.tokens, batch.expert_ids, strict=True):
        engine.recorder.begin_iteration()
        model.context.tape.pin(expert_ids)
        logits = model.decode(tokens, cache)
        logits.argmax(dim=-1)
    return logits, first_s, _now(engine)


def _now(engine: ExpertParallel) -> float:
    Device.of(engine.comm.device).synchronize_compute()
    return time.perf_counter()
