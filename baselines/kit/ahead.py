"""Caches that fill the next layer's slots while a layer computes, by a prediction of its experts."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from baselines.kit.cache import CachePolicy
from harmoeny.choices import Knowledge
from harmoeny.following import accuracy, expect, transitions
from harmoeny.placement import FloatArray, IntArray
from harmoeny.trace import RoutingTrace


@dataclass(kw_only=True)
class PrefetchingCache(CachePolicy):
    """A cache that learns in calibration batches how often tokens go from an expert to each of the next layer's.

    That stands in for the next layer's gate, which policies do not have. Execution follows the gate itself, so a wrong
    prediction costs time and nothing else.
    """

    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT, Knowledge.HISTORY, Knowledge.LOOKAHEAD})

    def __post_init__(self) -> None:
        #: Per layer, float64 ``[num_experts, num_experts]``, or None where there is none with the same tokens; and how
        #: well it predicts tokens that it was not fitted to. No options.
        self.following: list[FloatArray | None] = []
        self.accuracy: dict[str, float] = {}

    @property
    def calibration_batches(self) -> int:
        """Batches that say what follows what."""
        return 4

    def fitted(self, trace: RoutingTrace, num_experts: int, world_size: int) -> Self:  # noqa: ARG002
        """Return the policy with what follows what, and how well that predicts."""
        fitted = copy(self)
        fitted.following, fitted.accuracy = transitions(trace, num_experts), accuracy(trace, num_experts)
        return fitted

    def fit_report(self) -> dict[str, float]:
        """Return the accuracy on tokens that the prediction was not fitted to."""
        return self.accuracy

    def expected(self, layer: int, counts: IntArray) -> FloatArray | None:
        """Return float64 ``[num_experts]``, assignments that the next layer's experts are predicted to have, or None.

        As many experts have any as are active in the layer that was planned.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
        """
        then = self.following[layer] if layer < len(self.following) else None
        if then is None or not counts.any():
            return None
        total: FloatArray = expect(counts, then).sum(axis=0)
        total[np.argsort(-total, kind="stable")[int(counts.any(axis=0).sum()) :]] = 0.0
        return total
