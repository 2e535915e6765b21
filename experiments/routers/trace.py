"""Replays recorded routing: that of an earlier run, or the one that the paper's authors published."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.routers.base import (
    CALIBRATION_BATCH,
    WARM_UP_BATCH,
    FloatArray,
    RoutedRun,
    Router,
    RoutingRequest,
    SkippedPoint,
    exact_counts,
    route_by_counts,
)
from experiments.routing.authors_csv import read_published
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import read_trace
from harmoeny.placement import IntArray

_DRIFTS = ("none", "full")


@dataclass(kw_only=True)
class TraceRouter(Router):
    """Recorded routing, batch by batch: the recorded token paths, or, where there are only counts, tokens in any order.

    Attributes:
        path: a trace that ``trace.record=PATH`` wrote (Parquet), or one of the authors' ``expert_freq_*.csv``.
        case: the series of a published file: a data set or a skew.
        scale: give every expert its recorded share where a run's number of tokens is another than the recorded one.
        adapt: give them to a model of other sizes too. Layers take the recorded ones in turn; of twice the experts two
            share what one had recorded, of half the experts one takes what two had; no expert gets more than a token
            has for it. Only shares are recorded then, and the paths of tokens are drawn.
        sharpness: with ``adapt``, the power that shares are raised to before they are made to sum to 1 again: above 1
            makes popular experts more popular, below 1 evens out; null: as recorded.
        drift: with ``adapt``, ``none`` (every batch has the shares of all batches together), ``full`` (every batch has
            its own popularity on other experts, drawn anew) or null: as recorded.
        optional: leave the point out, with the reason, where the file is not there.
    """

    name: ClassVar[str] = "trace"
    description: ClassVar[str] = "recorded routing: router=trace router.path=FILE"
    limited: ClassVar[bool] = True

    path: str = ""
    case: str | None = None
    scale: bool = False
    adapt: bool = False
    sharpness: float | None = None
    drift: str | None = None
    optional: bool = False

    def validate(self, num_experts: int, top_k: int) -> None:
        """Read the trace and check that it fits the model.

        Raises:
            ValueError: no such file, a damaged one, or one of another number of experts or of choices per token.
            SkippedPoint: there is no such file, and it is optional.
        """
        self._check_changes()
        if not self.path:
            raise ValueError("router.path: '', must be a recorded routing: router=trace router.path=FILE")
        if not Path(self.path).is_file():
            if self.optional:
                raise SkippedPoint(f"router.path: {self.path!r} does not exist, so there is nothing to replay")
            raise ValueError(f"router.path: {self.path!r} does not exist, must be a recorded routing")
        try:
            trace = self._trace()
        except ValueError as error:
            field = "" if str(error).startswith("router.") else "router.path: "
            raise ValueError(f"{field}{error}") from error
        for name, found, wanted in (
            ()
            if self.adapt
            else (
                ("num_experts", trace.num_experts, num_experts),
                ("top_k", trace.top_k, top_k),
            )
        ):
            if found != wanted:
                raise ValueError(f"router.path: {self.path!r} has {name}={found}, must be model.{name}={wanted}")

    def _check_changes(self) -> None:
        """Refuse changes of the recorded shares that are none, and any where the recorded counts are replayed."""
        if self.sharpness is not None and not 0 < self.sharpness < float("inf"):
            raise ValueError(f"router.sharpness: {self.sharpness}, must be a number above 0, or null")
        if self.drift not in (None, *_DRIFTS):
            raise ValueError(f"router.drift: {self.drift!r}, must be one of {', '.join(_DRIFTS)}, or null")
        for name in ("sharpness", "drift"):
            if getattr(self, name) is not None and not self.adapt:
                raise ValueError(f"router.{name}: {getattr(self, name)!r}, must be null without router.adapt=true")

    def validate_run(self, run: RoutedRun) -> None:
        """Check that the trace has the layers, batches and tokens that the run will ask for.

        Raises:
            ValueError: it has not.
        """
        trace = self._trace()
        self._check_batches(trace, run)
        if self.adapt:
            return
        if trace.num_layers != len(run.layer_tokens):
            raise ValueError(
                f"router.path: {self.path!r} has {trace.num_layers} MoE layers, must be {len(run.layer_tokens)}, "
                "as the model has"
            )
        if run.learners and not trace.paths:
            raise ValueError(
                f"systems.{next(iter(run.learners))}: learns from the paths of tokens, which {self.path!r} does not "
                "have: leave it out, or record a run with trace.token_paths=true"
            )
        if not self.scale:
            self._check_tokens(trace, run)

    def why_no_steps(self) -> str:
        """Refuse to go on from recorded counts; where shares are replayed, further tokens have those of their batch."""
        return "" if self.adapt else "nothing is recorded of them; with router.adapt=true they get the batch's shares"

    def fingerprint(self) -> str:
        """Digest the file."""
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def recorded_on(self) -> str | None:
        """Return what the trace says."""
        return self._trace().dataset

    def recorded_tokens(self) -> int:
        """Return the median over batches and layers of the trace."""
        return int(np.median(self._trace().num_tokens.sum(axis=2)))

    def assign(self, request: RoutingRequest) -> IntArray:
        """Route as recorded."""
        trace, batch = self._trace(), self._batch(request)
        if trace.paths and not self.adapt and self._fits(trace, batch, request):
            return trace.path_of(batch, request.layer, request.rank, request.world_size)
        return route_by_counts(self.count(request), request, request.generator())

    def count(self, request: RoutingRequest) -> IntArray:
        """Return the recorded counts, or counts of the same shares."""
        trace, batch = self._trace(), self._batch(request)
        if self.adapt:
            shares = adapted_shares(self._changed(trace, batch, request.model_layer % trace.num_layers), request)
            return exact_counts(shares, request.num_tokens, request.top_k, request.generator())
        counts: IntArray = trace.spread_counts(batch, request.layer, request.world_size)[request.rank]
        if self._fits(trace, batch, request):
            return counts
        assert self.scale, "checked before anything runs"
        total = trace.counts[batch, request.layer].sum(axis=0)
        return exact_counts(_shares(total), request.num_tokens, request.top_k, request.generator())

    def _changed(self, trace: RecordedRouting, batch: int, layer: int) -> FloatArray:
        """Return float64 ``[recorded experts]``, weights of experts with the changes that are asked for."""
        counts = (
            trace.counts[:, layer].sum(axis=(0, 1)) if self.drift == "none" else trace.counts[batch, layer].sum(axis=0)
        )
        weights = _shares(counts)
        if self.drift == "full":
            weights = weights[np.random.default_rng([batch, layer]).permutation(len(weights))]
        return weights if self.sharpness is None else weights**self.sharpness

    def _trace(self) -> RecordedRouting:
        path = Path(self.path)
        status = path.stat()
        return _read(path, self.case, (status.st_mtime_ns, status.st_size))

    def _batch(self, request: RoutingRequest) -> int:
        """Measured batches are the first ones of the trace, those for calibration the last ones.

        A trace has no batch to spare for the warm-up: it takes the last one, and nothing is learned from it.
        """
        if request.batch < CALIBRATION_BATCH:
            return request.batch
        if request.batch == WARM_UP_BATCH:
            return self._trace().num_batches - 1
        return self._trace().num_batches - 1 - (request.batch - CALIBRATION_BATCH)

    def _fits(self, trace: RecordedRouting, batch: int, request: RoutingRequest) -> bool:
        tokens = trace.spread_tokens(batch, request.layer, request.world_size)[request.rank]
        return bool(tokens == request.num_tokens)

    def _check_batches(self, trace: RecordedRouting, run: RoutedRun) -> None:
        """Refuse fewer batches than rounds, and those before them that systems learn from."""
        learner, learned = max(run.learners.items(), key=lambda item: item[1], default=("", 0))
        left = trace.num_batches - learned
        if run.num_batches <= left:
            return
        has = f"{self.path!r} has {trace.num_batches} batches"
        taken = f", of which systems.{learner} learns from {learned}, and none is used twice" if learned else ""
        if left >= 1:
            raise ValueError(f"rounds: {run.num_batches}, must be at most {left}: {has}{taken}")
        raise ValueError(
            f"systems.{learner}: learns from {learned} batches that are not measured, but {has}: leave it out, or "
            f"record at least {learned + run.num_batches} rounds"
        )

    def _check_tokens(self, trace: RecordedRouting, run: RoutedRun) -> None:
        for batch in range(run.num_batches):
            for layer, wanted in enumerate(run.layer_tokens):
                found = trace.spread_tokens(batch, layer, run.world_size)
                if (found != wanted).any():
                    raise ValueError(
                        f"router.path: {self.path!r} has {found.tolist()} tokens on the ranks in batch {batch}, layer "
                        f"{layer}, must be {wanted}: choose batch_size, seq_len and world_size like that, or "
                        "router.scale=true"
                    )


def adapted_shares(counts: IntArray | FloatArray, request: RoutingRequest) -> FloatArray:
    """Return float64 ``[request.num_experts]``, recorded shares on another number of experts.

    Both numbers of experts divide a line of length 1 evenly; an expert gets what was recorded of its piece.

    Args:
        counts: ``[recorded experts]``, assignments, or weights in proportion.
        request: tokens of the run.
    """
    ends = np.arange(request.num_experts + 1) / request.num_experts * len(counts)
    recorded = np.concatenate([[0.0], np.cumsum(_shares(counts))])
    return np.diff(np.interp(ends, np.arange(len(counts) + 1), recorded))


def _shares(counts: IntArray | FloatArray) -> FloatArray:
    shares: FloatArray = counts / counts.sum() if counts.any() else np.full(len(counts), 1 / len(counts))
    return shares


@lru_cache(maxsize=4)
def _read(path: Path, case: str | None, _: tuple[int, int]) -> RecordedRouting:
    if path.suffix == ".csv":
        return read_published(path, case)
    if case is not None:
        raise ValueError(f"router.case: {case!r}, must be null: {str(path)!r} holds one series")
    return read_trace(path)
