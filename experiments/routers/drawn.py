"""Drawn routing: every token draws its experts by itself, from a popularity that falls as a power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import Router, RoutingRequest
from experiments.routers.kit.power import check_exponent
from harmoeny.placement import IntArray


@dataclass(kw_only=True)
class DrawnRouter(Router):
    """Tokens draw without repetition, expert e with a weight of ``(e + 1) ** -exponent``.

    Where a batch has few tokens, as in a step of a decode phase, their experts change from batch to batch; routers that
    give exact shares would choose the most popular ones each time. Weights are those of a Gumbel top-k
    (arXiv 1903.06059).

    Attributes:
        exponent: 0 is uniform; 1 is Zipf's law.
        shuffled: popularity falls in an order drawn from the run's seed, the same for all layers and batches, and not
            from expert 0 on. Otherwise a cache that begins with the first experts begins with the best.
    """

    name: ClassVar[str] = "drawn"
    description: ClassVar[str] = "every token draws its experts, by a popularity that falls as a power"

    exponent: float = 1.0
    shuffled: bool = False

    def validate(self, num_experts: int, top_k: int) -> None:  # noqa: ARG002
        """Check the exponent.

        Raises:
            ValueError: an exponent outside 0 to 10.
        """
        check_exponent(self.exponent)

    def assign(self, request: RoutingRequest) -> IntArray:
        """Return int64 ``[num_tokens, top_k]``."""
        logits = -self.exponent * np.log(np.arange(1, request.num_experts + 1))
        if self.shuffled:
            logits = np.random.default_rng(request.seed).permutation(logits)
        drawn = logits + request.generator().gumbel(size=(request.num_tokens, request.num_experts))
        chosen: IntArray = np.argsort(-drawn, axis=1, kind="stable")[:, : request.top_k]
        return chosen
