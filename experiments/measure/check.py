"""Is a system's output the dense model's? Asked for every system in every run, before anything is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.peak_memory import with_peak_bytes
from experiments.results.run_folder import RunError
from harmoeny.models.base import MoEModel
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System

#: Largest absolute error, relative to the largest absolute output of the reference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class CheckError(RunError):
    """A system's output is not what the dense model computes."""


@dataclass(frozen=True)
class Check:
    """Result of comparing one system with the dense reference, over all ranks.

    Attributes:
        max_abs_error: largest absolute difference of an output.
        scale: largest absolute output of the reference.
        relative_error: their ratio.
        tolerance: what it may be.
        kept_share: executed assignments over all; below 1 for dropping systems only.
        working_memory_bytes: the most memory that the pass needed on a rank beyond what it held before; None: unknown.
        passed: whether the system computes what it should.
    """

    max_abs_error: float
    scale: float
    relative_error: float
    tolerance: float
    kept_share: float
    working_memory_bytes: int | None
    passed: bool


def dense_forward(model: MoEModel, input_ids: Tensor) -> Tensor:
    """Run the untouched model on this rank alone."""
    model.context.dense = True
    try:
        return model.forward(input_ids)
    finally:
        model.context.dense = False


def check_system(
    model: MoEModel, engine: ExpertParallel, system: System, input_ids: Tensor, expert_ids: list[Tensor]
) -> Check:
    """Compare a system's output with the dense model's, with the same routing.

    A dropping system is compared with the dense model on exactly the assignments that it executed.

    Args:
        model: the model, attached to ``engine``.
        engine: executes its layers.
        system: the system to check.
        input_ids: int64 ``[batch_size, seq_len]``.
        expert_ids: int64 ``[num_tokens, top_k]`` per layer.

    Raises:
        CheckError: on every rank, when the outputs differ on any, or an exact system lost an assignment.
    """
    engine.use(system)
    model.context.tape.pin(expert_ids)
    with engine.executed_masks() as masks:
        output = model.forward(input_ids)
    # A second pass: the first one loads libraries and compiled code.
    _, peak_bytes = with_peak_bytes(lambda: model.forward(input_ids), engine.comm.device)

    kept = [torch.where(mask, ids, -1) for mask, ids in zip(masks, expert_ids, strict=True)]
    model.context.tape.pin(kept)
    reference = dense_forward(model, input_ids)

    num_wanted = sum(int((ids >= 0).sum()) for ids in expert_ids)
    num_kept = sum(int((ids >= 0).sum()) for ids in kept)
    error = float((output.float() - reference.float()).abs().max()) if output.numel() else 0.0
    scale = float(reference.float().abs().max()) if output.numel() else 0.0
    finite = bool(torch.isfinite(output).all())
    rows: list[Any] = [(error, scale, num_wanted, num_kept, finite, peak_bytes)]
    if engine.comm.world_size > 1:
        rows = [None] * engine.comm.world_size
        dist.all_gather_object(rows, (error, scale, num_wanted, num_kept, finite, peak_bytes))
    check = _judge(rows, TOLERANCE[reference.dtype], exact=system.policy.exact)
    if not check.passed:
        raise CheckError(f"{system.name}: output differs from the dense model's: {asdict(check)}")
    return check


def _judge(rows: list[tuple[float, float, int, int, bool, int | None]], tolerance: float, *, exact: bool) -> Check:
    errors, scales, wanted, kept, finite, peaks = zip(*rows, strict=True)
    scale = max(scales)
    relative = max(errors) / scale if scale else max(errors)
    kept_share = sum(kept) / sum(wanted) if sum(wanted) else 1.0
    return Check(
        max_abs_error=max(errors),
        scale=scale,
        relative_error=relative,
        tolerance=tolerance,
        kept_share=kept_share,
        working_memory_bytes=None if None in peaks else max(peaks),
        passed=all(finite) and relative <= tolerance and (not exact or kept_share == 1.0),
    )
