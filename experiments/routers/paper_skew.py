"""The paper's own synthetic skew: one hot expert gets a share, the others what is left, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import Router, RoutingRequest, route_by_counts
from harmoeny.placement import IntArray


@dataclass(kw_only=True)
class PaperSkewRouter(Router):
    """Routing as the authors of arXiv 2506.12417 published it, for comparison with their figures.

    A token goes to expert 0 with probability ``skew``, and its other choices to the other experts alike; so at skew 0
    expert 0 has no work at all. All ranks draw the same numbers, as the authors' did.

    Attributes:
        skew: probability of expert 0.
    """

    name: ClassVar[str] = "paper_skew"
    description: ClassVar[str] = (
        "the paper's: expert 0 with probability skew, else another at random, alike on all ranks"
    )

    skew: float = 0.0

    def validate(self, num_experts: int, top_k: int) -> None:
        """Check that such routing exists for this layer.

        Raises:
            ValueError: a skew outside 0 to 1, or too few experts for a token's other choices.
        """
        if not 0 <= self.skew <= 1:
            raise ValueError(f"router.skew: {self.skew}, must be 0 to 1")
        if num_experts <= top_k:
            raise ValueError(f"model.num_experts: {num_experts}, must be above model.top_k={top_k} for this router")

    def assign(self, request: RoutingRequest) -> IntArray:
        """Route with the counts of :meth:`count`."""
        return route_by_counts(self.count(request), request, request.generator())

    def count(self, request: RoutingRequest) -> IntArray:
        """Draw the counts."""
        seed = np.random.SeedSequence([request.seed, request.batch], spawn_key=(request.layer,))
        rng = np.random.default_rng(seed)
        num_tokens, num_others = request.num_tokens, request.num_experts - 1
        hot = int(rng.binomial(num_tokens, self.skew))
        counts = np.empty(request.num_experts, dtype=np.int64)
        counts[0] = hot
        counts[1:] = rng.multinomial(num_tokens * request.top_k - hot, np.full(num_others, 1 / num_others))
        # An expert takes a token at most once; what a draw of few experts has above that, the least popular ones take.
        others = counts[1:]
        excess = int(np.maximum(others - num_tokens, 0).sum())
        np.minimum(others, num_tokens, out=others)
        while excess:
            lowest = int(np.argmin(others))
            taken = min(excess, num_tokens - int(others[lowest]))
            others[lowest] += taken
            excess -= taken
        return counts
