"""The decode phase: after the first token one token per step and sequence, with the keys and values kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.batch import Batch, assigned, dense
from experiments.measure.bench import Bench
from experiments.measure.turns import collector_paused, in_turn
from experiments.results.layer_rows import layer_row
from experiments.results.request_rows import Decoded, decode_totals
from harmoeny.runtime.device import Device
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


def make_decode_batch(bench: Bench, prompt: Batch, index: int, num_steps: int) -> DecodeBatch:
    """Let the untouched model decode, and keep its tokens and the routing of every step.

    With ``router=model`` the routing is the model's own; other routers decide every step anew, with their shares.

    Args:
        bench: has the model and the router.
        prompt: this rank's share of a batch.
        index: of the batch.
        num_steps: tokens after the first, at least 1.
    """
    model, point = bench.model, bench.point
    steps: list[list[Tensor]] = []
    tokens: list[Tensor] = []
    with dense(model):
        model.context.tape.pin(prompt.expert_ids)
        logits, cache = model.prefill(prompt.input_ids)
        for step in range(num_steps):
            tokens.append(logits.argmax(dim=-1))
            pinned = None if point.router.from_model else _step_routing(bench, prompt, index, step)
            model.context.tape.pin(pinned)
            logits = model.decode(tokens[-1], cache)
            steps.append(model.context.tape.recorded if pinned is None else pinned)
    return DecodeBatch(prompt, torch.stack(tokens), steps, logits)


def _step_routing(bench: Bench, prompt: Batch, index: int, step: int) -> list[Tensor]:
    """Return int64 ``[batch_size, top_k]`` per MoE layer."""
    point, rank, ids = bench.point, bench.comm.rank, prompt.input_ids
    num_layers = len(bench.model.experts)
    first = (step + 1) * num_layers
    layers = range(first, first + num_layers)
    return [
        assigned(point, index=index, rank=rank, layer=layer, num_tokens=len(ids), num_layers=num_layers).to(ids.device)
        for layer in layers
    ]


def decode_error(bench: Bench, system: System, batch: DecodeBatch) -> float:
    """Compare what a system says after the last step with the untouched model; all ranks together.

    Returns:
        The largest error relative to the scale of the logits, over all ranks.
    """
    bench.engine.use(system)
    logits, _, _ = _decode(bench, batch)
    bench.engine.finish()
    error, scale = float((logits - batch.logits).abs().max()), float(batch.logits.abs().max())
    worst = torch.tensor([error, scale], device=bench.comm.device)
    if bench.comm.world_size > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst[0] / worst[1])


def decode_rounds(bench: Bench, batches: Sequence[DecodeBatch]) -> list[Decoded]:
    """Measure the decode phase of every system on every batch, one batch a round; all ranks together."""
    records, recorder = [], bench.engine.recorder
    bench.begin_loop()
    for round_index, batch in enumerate(batches):
        bench.rig.begin_round()
        for system in in_turn(bench.systems, round_index, len(batches)):
            bench.progress.say(f"decode, round {round_index + 1} of {len(batches)}")
            bench.engine.use(system)
            with collector_paused():
                _, first_s, last_s = _decode(bench, batch)
            bench.engine.finish()
            num_steps, num_sequences = batch.tokens.shape
            records.append(
                Decoded(
                    system=system.name,
                    round=round_index,
                    rank=bench.comm.rank,
                    num_sequences=num_sequences,
                    num_steps=num_steps,
                    first_token_s=first_s + bench.rig.clock_offset_s,
                    last_token_s=last_s + bench.rig.clock_offset_s,
                    totals=decode_totals(layer_row(times, bench.comm.rank, 0.0) for times in recorder.collect()),
                )
            )
            bench.progress.advance()
    return records


def _decode(bench: Bench, batch: DecodeBatch) -> tuple[Tensor, float, float]:
    """Return the logits after the last step, and when the first and the last tokens were out, in seconds."""
    model, recorder = bench.model, bench.engine.recorder
    bench.comm.barrier()
    recorder.begin_iteration()
    model.context.tape.pin(batch.prompt.expert_ids)
    logits, cache = model.prefill(batch.prompt.input_ids)
    logits.argmax(dim=-1)
    first_s = _now_s(bench)
    recorder.begin_iteration()
    for tokens, expert_ids in zip(batch.tokens, batch.expert_ids, strict=True):
        model.context.tape.pin(expert_ids)
        logits = model.decode(tokens, cache)
        logits.argmax(dim=-1)
    return logits, first_s, _now_s(bench)


def _now_s(bench: Bench) -> float:
    Device.of(bench.comm.device).synchronize_compute()
    return time.perf_counter()
