"""Is a system's output the dense model's? Asked for every system in every run, before anything is timed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.measure.batch import dense_forward
from experiments.measure.bench import Bench
from experiments.measure.decode import DecodeBatch, decode_error, make_decode_batch
from experiments.measure.layer_check import LayerErrors
from experiments.measure.plan_guard import PlanError, guarded_plans
from experiments.routers.base import WARM_UP_BATCH
from harmoeny.models.base import DTYPES, TOLERANCE
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.system import System


@dataclass(frozen=True)
class Check:
    """Result of comparing one system with the dense reference, over all ranks; unknown where no plan was carried out.

    Attributes:
        max_abs_error: largest absolute difference of an output.
        scale: largest absolute output of the reference.
        relative_error: their ratio.
        layer_error: largest absolute error of a MoE layer's output, relative to the layer's largest output.
        tolerance: what it may be.
        kept_share: executed assignments over all; below 1 for dropping systems only.
        working_memory_bytes: the most memory that the pass needed on a rank beyond what it held before; None: unknown.
        passed: whether the system computes what it should.
        reason: why it does not, with the rank; None where it does.
    """

    tolerance: float
    max_abs_error: float | None = None
    scale: float | None = None
    relative_error: float | None = None
    layer_error: float | None = None
    kept_share: float | None = None
    working_memory_bytes: int | None = None
    passed: bool = False
    reason: str | None = None


def check_systems(bench: Bench, at: str = "") -> dict[str, dict[str, Any]]:
    """Compare every system's output on a batch that is not measured with the dense model's, with the same routing.

    Systems that executed all assignments share one reference; a dropping system is compared with the dense model on
    exactly the assignments that it executed. Where a decode phase is measured, exact systems have to decode right too.

    Args:
        bench: the point; plans differ from point to point, so each has its own check.
        at: names it beside others of its group, as in `` at skew=0.9``.

    Returns:
        By system, the fields of its :class:`Check` and, with a decode phase, its ``decode_error``; the same on all
        ranks, which call it together.
    """
    checker = Checker(bench)
    checks = {}
    for system in bench.systems:
        bench.progress.say(f"checking {system.name}{at}")
        checks[system.name] = checker.check(system)
        bench.progress.advance()
    return checks


class Checker:
    """Checks the systems of a bench, one after another."""

    def __init__(self, bench: Bench) -> None:
        """Prepare the batch; all ranks do it together."""
        self._bench = bench
        self._dtype = DTYPES[bench.point.model.dtype]
        self._tolerance = TOLERANCE[self._dtype]
        self._complete: Tensor | None = None
        self._decode: DecodeBatch | None = None
        if num_steps := bench.point.options.num_decode_steps:
            self._decode = make_decode_batch(bench, bench.warm_up, WARM_UP_BATCH, num_steps)

    def check(self, system: System) -> dict[str, Any]:
        """Check one system; all ranks together."""
        bench, extra = self._bench, {}
        try:
            errors = LayerErrors(bench.model.experts)
            output, kept, peak_bytes = _execute(bench, system, errors)
            reference = self._reference(kept)
            outcome = Outcome.of(output, reference, bench.warm_up.expert_ids, kept)
            outcome = replace(outcome, layer_error=errors.worst, layer=errors.layer, peak_bytes=peak_bytes)
            check = judge(_everyone(outcome, bench.comm), self._tolerance, exact=system.policy.exact)
            if self._decode is not None and system.policy.exact and check.passed:
                with guarded_plans(system, bench.comm):
                    extra["decode_error"] = decode_error(bench, system, self._decode)
        except PlanError as error:
            check = Check(self._tolerance, reason=str(error))
        fields = asdict(check)
        if wrong := self._wrong_weights() or _wrong_decode(extra.get("decode_error", 0.0), self._tolerance):
            fields |= {"passed": False, "reason": wrong}
        return fields | extra

    def _reference(self, kept: list[Tensor]) -> Tensor:
        """Return the dense model's output without the assignments that were not executed."""
        bench, wanted = self._bench, self._bench.warm_up.expert_ids
        is_complete = all(bool(mask[ids >= 0].all()) for mask, ids in zip(kept, wanted, strict=True))
        if is_complete and self._complete is not None:
            return self._complete
        reference = dense_forward(bench.model, bench.warm_up.input_ids, wanted, None if is_complete else kept)
        if is_complete:
            self._complete = reference
        return reference

    def _wrong_weights(self) -> str | None:
        """Say so where the experts are not of the type that was asked for, and measured with its tolerance."""
        matrices = (w for layer in self._bench.model.experts for w in layer.weights.values() if w.ndim == 3)
        for dtype in {w.dtype for w in matrices if w.is_floating_point()} - {self._dtype}:
            return f"the experts' weights are {_name(dtype)}, must be {_name(self._dtype)} (model.dtype)"
        return None


def _execute(bench: Bench, system: System, errors: LayerErrors) -> tuple[Tensor, list[Tensor], int | None]:
    """Run a system; return its output, which assignments it executed, and its peak memory in bytes.

    Args:
        bench: has the batch.
        system: the system.
        errors: is shown every layer.

    Raises:
        PlanError: on all ranks, a plan is wrong.
    """
    engine, model, batch = bench.engine, bench.model, bench.warm_up
    engine.use(system)
    model.context.tape.pin(batch.expert_ids)
    with guarded_plans(system, bench.comm):
        with engine.executed_masks() as masks, engine.observed(errors):
            output = model.forward(batch.input_ids)
        if system.planner.places_anew:
            model.forward(batch.input_ids)  # the plans from the placement that follows what was seen
    # Another pass: the first one loads libraries and compiled code.
    _, peak_bytes = Device.of(bench.comm.device).with_peak_bytes(lambda: model.forward(batch.input_ids))
    return output, masks, peak_bytes


@dataclass(frozen=True)
class Outcome:
    """How one rank's output compares with the reference.

    Attributes:
        error: largest absolute difference.
        scale: largest absolute output of the reference.
        num_wanted: assignments.
        num_kept: executed ones.
        problem: why it cannot be compared (shape, type, numbers that are not finite); None: it can.
        layer_error: largest absolute error of a MoE layer's output, relative to the layer's largest output.
        layer: which layer that was.
        peak_bytes: memory that the pass needed beyond what was held before; None: unknown.
    """

    error: float
    scale: float
    num_wanted: int
    num_kept: int
    problem: str | None
    layer_error: float = 0.0
    layer: int = 0
    peak_bytes: int | None = None

    @classmethod
    def of(cls, output: Tensor, reference: Tensor, wanted: list[Tensor], kept: list[Tensor]) -> Outcome:
        """Compare.

        Args:
            output: the system's.
            reference: the dense model's.
            wanted: int64 ``[num_tokens, top_k]`` per MoE layer, -1 for none.
            kept: bool, likewise, the executed assignments.
        """
        comparable = output.shape == reference.shape and output.numel() > 0
        return cls(
            error=float((output.float() - reference.float()).abs().max()) if comparable else 0.0,
            scale=float(reference.float().abs().max()) if reference.numel() else 0.0,
            num_wanted=sum(int((ids >= 0).sum()) for ids in wanted),
            num_kept=sum(int(mask.sum()) for mask in kept),
            problem=_problem(output, reference),
        )


def _problem(output: Tensor, reference: Tensor) -> str | None:
    if output.shape != reference.shape:
        return f"the output is {tuple(output.shape)}, the dense model's {tuple(reference.shape)}"
    if output.dtype != reference.dtype:
        return f"the output is {_name(output.dtype)}, the dense model's {_name(reference.dtype)}"
    for what, tensor in (("the dense model's output", reference), ("the output", output)):
        if not torch.isfinite(tensor).all():
            number = int((~torch.isfinite(tensor)).sum())
            return f"{number} of {tensor.numel()} numbers of {what} are NaN or infinite"
    return None


def _everyone(own: Outcome, comm: Communicator) -> list[Outcome]:
    """Return the outcomes of all ranks, which call it together."""
    ranks: list[Any] = [own]
    if comm.world_size > 1:
        ranks = [None] * comm.world_size
        dist.all_gather_object(ranks, own)
    return ranks


def judge(ranks: list[Outcome], tolerance: float, *, exact: bool) -> Check:
    """Put the outcomes of all ranks together."""
    max_error, scale = max(rank.error for rank in ranks), max(rank.scale for rank in ranks)
    num_wanted = sum(rank.num_wanted for rank in ranks)
    peaks = [rank.peak_bytes for rank in ranks if rank.peak_bytes is not None]
    reason = _reason(ranks, tolerance, exact=exact)
    return Check(
        tolerance=tolerance,
        max_abs_error=_number(max_error),
        scale=_number(scale),
        relative_error=_number(max_error / scale if scale else max_error),
        layer_error=_number(max(rank.layer_error for rank in ranks)),
        kept_share=sum(rank.num_kept for rank in ranks) / num_wanted if num_wanted else 1.0,
        working_memory_bytes=max(peaks) if len(peaks) == len(ranks) else None,
        passed=reason is None,
        reason=reason,
    )


def _reason(ranks: list[Outcome], tolerance: float, *, exact: bool) -> str | None:
    """Return the first thing that is wrong, with its rank; None: nothing."""
    scale = max(rank.scale for rank in ranks) or 1.0
    for number, rank in enumerate(ranks):
        if rank.problem is not None:
            return f"rank {number}: {rank.problem}"
    for number, rank in enumerate(ranks):
        if exact and rank.num_kept != rank.num_wanted:
            lost = rank.num_wanted - rank.num_kept
            return f"rank {number}: {lost} of {rank.num_wanted} assignments were not executed"
    for number, rank in enumerate(ranks):
        if not rank.layer_error <= tolerance:
            return (
                f"rank {number}, MoE layer {rank.layer}: the output differs from that of its experts by "
                f"{rank.layer_error:.2g} of its scale, allowed {tolerance:.0e}"
            )
    worst = max(range(len(ranks)), key=lambda number: ranks[number].error)
    relative = ranks[worst].error / scale
    if not relative <= tolerance:
        return (
            f"rank {worst}: the output differs from the dense model's by {relative:.2g} of its scale, allowed "
            f"{tolerance:.0e}"
        )
    return None


def _number(value: float) -> float | None:
    """Return what JSON can say of a number: None where there is none."""
    return value if math.isfinite(value) else None


def _wrong_decode(error: float, tolerance: float) -> str | None:
    if error <= tolerance:
        return None
    return f"decode differs from the dense model's by {error:.2g} of its scale, allowed {tolerance:.0e}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
