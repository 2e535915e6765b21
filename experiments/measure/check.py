"""Is a system's output the dense model's? Asked for every system in every run, before anything is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.batch import Batch, dense_forward
from experiments.measure.bench import Bench
from experiments.results.run_folder import RunError
from harmoeny.models.base import TOLERANCE
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.system import System


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


def check_systems(bench: Bench) -> dict[str, dict[str, Any]]:
    """Compare every system's output on the first batch with the dense model's, with the same routing.

    Systems that executed all assignments share one reference; a dropping system is compared with the dense model on
    exactly the assignments that it executed, with the routing weights of the whole choice.

    Returns:
        By system, the fields of its :class:`Check`.

    Raises:
        CheckError: on every rank, when the outputs differ on any, or an exact system lost an assignment.
    """
    batch = bench.batches[0]
    complete: Tensor | None = None
    checks = {}
    for system in bench.systems:
        bench.progress.say(f"checking {system.name}")
        executed = _execute(bench, system, batch)
        if not executed.is_complete:
            reference = dense_forward(bench.model, batch.input_ids, batch.expert_ids, executed.kept)
        else:
            if complete is None:
                complete = dense_forward(bench.model, batch.input_ids, batch.expert_ids)
            reference = complete
        outcome = _Outcome.of(executed, reference)
        checks[system.name] = vars(_judged(system, outcome, reference.dtype, bench.comm))
        bench.progress.advance()
    return checks


@dataclass(frozen=True)
class _Executed:
    """What a system did with a batch.

    Attributes:
        output: of the model.
        wanted: bool ``[num_tokens, top_k]`` per MoE layer, false where the routing leaves the assignment out.
        kept: likewise, true where an assignment was executed.
        peak_bytes: memory that the pass needed beyond what was held before; None: unknown.
    """

    output: Tensor
    wanted: list[Tensor]
    kept: list[Tensor]
    peak_bytes: int | None

    @property
    def is_complete(self) -> bool:
        """Whether no assignment was dropped."""
        return all(torch.equal(kept, wanted) for kept, wanted in zip(self.kept, self.wanted, strict=True))


def _execute(bench: Bench, system: System, batch: Batch) -> _Executed:
    engine, model = bench.engine, bench.model
    engine.use(system)
    model.context.tape.pin(batch.expert_ids)
    with engine.executed_masks() as masks:
        output = model.forward(batch.input_ids)
    # A second pass: the first one loads libraries and compiled code.
    _, peak_bytes = Device.of(bench.comm.device).with_peak_bytes(lambda: model.forward(batch.input_ids))
    wanted = [ids >= 0 for ids in batch.expert_ids]
    return _Executed(output, wanted, [mask & some for mask, some in zip(masks, wanted, strict=True)], peak_bytes)


@dataclass(frozen=True)
class _Outcome:
    """How one rank's output compares with the reference.

    Attributes:
        error: largest absolute difference.
        scale: largest absolute output of the reference.
        num_wanted: assignments.
        num_kept: executed ones.
        finite: whether all outputs are numbers.
        peak_bytes: as of the system.
    """

    error: float
    scale: float
    num_wanted: int
    num_kept: int
    finite: bool
    peak_bytes: int | None

    @classmethod
    def of(cls, executed: _Executed, reference: Tensor) -> _Outcome:
        """Compare a system's output with the reference."""
        output = executed.output
        return cls(
            error=float((output.float() - reference.float()).abs().max()) if output.numel() else 0.0,
            scale=float(reference.float().abs().max()) if output.numel() else 0.0,
            num_wanted=sum(int(mask.sum()) for mask in executed.wanted),
            num_kept=sum(int(mask.sum()) for mask in executed.kept),
            finite=bool(torch.isfinite(output).all()),
            peak_bytes=executed.peak_bytes,
        )


def _judged(system: System, own: _Outcome, dtype: torch.dtype, comm: Communicator) -> Check:
    """Return the check of a system over all ranks, which call it together."""
    ranks: list[Any] = [own]
    if comm.world_size > 1:
        ranks = [None] * comm.world_size
        dist.all_gather_object(ranks, own)
    check = _judge(ranks, TOLERANCE[dtype], exact=system.policy.exact)
    if not check.passed:
        raise CheckError(f"{system.name}: output differs from the dense model's: {asdict(check)}")
    return check


def _judge(ranks: list[_Outcome], tolerance: float, *, exact: bool) -> Check:
    max_error, scale = max(rank.error for rank in ranks), max(rank.scale for rank in ranks)
    relative = max_error / scale if scale else max_error
    num_wanted = sum(rank.num_wanted for rank in ranks)
    kept_share = sum(rank.num_kept for rank in ranks) / num_wanted if num_wanted else 1.0
    peaks = [rank.peak_bytes for rank in ranks if rank.peak_bytes is not None]
    return Check(
        max_abs_error=max_error,
        scale=scale,
        relative_error=relative,
        tolerance=tolerance,
        kept_share=kept_share,
        working_memory_bytes=max(peaks) if len(peaks) == len(ranks) else None,
        passed=all(rank.finite for rank in ranks) and relative <= tolerance and (not exact or kept_share == 1.0),
    )
