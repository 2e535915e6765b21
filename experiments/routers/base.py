"""The interface of a router, and exact routing from shares: counts first, then tokens in shuffled order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from harmoeny.placement import IntArray

FloatArray = npt.NDArray[np.float64]

#: Batch indices from here on are for calibration, far from all measured ones.
CALIBRATION_BATCH = 1_000_000
#: The batch of the checks and of all warm-up rounds, which is neither measured nor learned from.
WARM_UP_BATCH = 2_000_000


@dataclass(frozen=True, kw_only=True)
class RoutingRequest:
    """The tokens to route: one rank's share of one batch in one MoE layer.

    Attributes:
        num_tokens: tokens, may be 0.
        num_experts: experts of the layer.
        top_k: different experts per token.
        batch: index of the batch.
        layer: MoE layer in order of execution.
        rank: the rank that the tokens belong to.
        seed: seed of the run.
        world_size: ranks of the run.
        num_layers: MoE layers of the model, of which the steps after a prompt go through as many again; None: no steps.
    """

    num_tokens: int
    num_experts: int
    top_k: int
    batch: int
    layer: int
    rank: int
    seed: int
    world_size: int
    num_layers: int | None = None

    @property
    def model_layer(self) -> int:
        """The model's layer, whatever the step."""
        return self.layer if self.num_layers is None else self.layer % self.num_layers

    def generator(self) -> np.random.Generator:
        """Return the generator of these tokens: the same for the same request, independent of all others."""
        # A spawn key, since numpy takes [seed, batch] and [seed, batch, 0, 0] for the same seed.
        return np.random.default_rng(np.random.SeedSequence([self.seed, self.batch], spawn_key=(self.layer, self.rank)))

    def batch_generator(self) -> np.random.Generator:
        """Return a generator that all ranks and layers of a batch share."""
        return np.random.default_rng([self.seed, self.batch])


@dataclass(frozen=True)
class RoutedRun:
    """What a run will ask its router for.

    Attributes:
        layer_tokens: tokens of a rank per MoE layer.
        world_size: ranks.
        num_batches: measured batches.
        learners: systems that learn from the routing of batches before those, and of how many.
    """

    layer_tokens: Sequence[int]
    world_size: int
    num_batches: int
    learners: Mapping[str, int]


@dataclass(kw_only=True)
class Router(ABC):
    """A source of routing decisions; a keyword-only dataclass whose fields are the options ``router.<field>``."""

    name: ClassVar[str]
    description: ClassVar[str]
    #: True where the decisions are recorded from the model's own routers and `assign` is never called.
    from_model: ClassVar[bool] = False
    #: True where `validate_run` has something to check.
    limited: ClassVar[bool] = False

    def validate(self, num_experts: int, top_k: int) -> None:  # noqa: ARG002  (for routers with limits)
        """Check the configuration before any worker starts.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        return

    def why_no_steps(self) -> str:
        """Say why tokens that follow a prompt have no routing; empty: they have."""
        return ""

    def validate_run(self, run: RoutedRun) -> None:  # noqa: ARG002  (for routers that are `limited`)
        """Check that the router can route all of a run, before any worker starts.

        Raises:
            ValueError: what it lacks.
        """
        return

    def remark(self, request: RoutingRequest) -> str:  # noqa: ARG002  (for routers that cannot always do as asked)
        """Say in one line how tokens are routed other than asked for; empty: they are not.

        Args:
            request: tokens of the run, as an example.
        """
        return ""

    def fingerprint(self) -> str:
        """Return a digest of what the routing depends on beside the options; empty: nothing."""
        return ""

    def recorded_on(self) -> str | None:
        """Return the name of the data set whose routing is replayed; None: nothing is replayed."""
        return None

    def recorded_tokens(self) -> int | None:
        """Return how many tokens of all ranks a batch of the replayed routing has; None: nothing is replayed."""
        return None

    @abstractmethod
    def assign(self, request: RoutingRequest) -> IntArray:
        """Return int64 ``[num_tokens, top_k]``, different experts per token; -1 leaves an assignment out."""

    def count(self, request: RoutingRequest) -> IntArray:
        """Return int64 ``[num_experts]``, the assignments of :meth:`assign`; all that a simulation needs."""
        ids = self.assign(request)
        return np.bincount(ids[ids >= 0], minlength=request.num_experts).astype(np.int64)


class SharesRouter(Router):
    """A router whose experts get exact shares of the assignments."""

    @abstractmethod
    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return float64 ``[num_experts]``, summing to 1."""

    def remark(self, request: RoutingRequest) -> str:
        """Say which share no expert can have: it takes a token at most once, so 1 / top_k is the limit."""
        shares = self.shares(request)
        limit, largest = 1 / request.top_k, int(np.argmax(shares))
        if shares[largest] <= limit * (1 + 1e-9):
            return ""
        number = int(np.count_nonzero(shares > limit * (1 + 1e-9)))
        return (
            f"router={self.name}: shares are capped at {limit:.3g} (1 / model.top_k): a token meets an expert once; "
            f"{number} of {request.num_experts} experts, the largest asked for {shares[largest]:.3g} (expert "
            f"{largest}), and the others share what is left"
        )

    def assign(self, request: RoutingRequest) -> IntArray:
        """Route with exact counts."""
        return route_by_shares(self.shares(request), request)

    def count(self, request: RoutingRequest) -> IntArray:
        """Return the counts alone; the same, since the counts are drawn first."""
        return exact_counts(self.shares(request), request.num_tokens, request.top_k, request.generator())


def route_by_shares(shares: FloatArray, request: RoutingRequest) -> IntArray:
    """Route so that every expert gets its share of the assignments, exact up to rounding.

    Args:
        shares: float64 ``[num_experts]``, summing to 1; no expert gets more than one assignment per token, and what a
            share has above that goes to the others in proportion.
        request: the tokens to route.

    Returns:
        int64 ``[num_tokens, top_k]``, different experts per token, tokens in shuffled order.
    """
    rng = request.generator()
    return route_by_counts(exact_counts(shares, request.num_tokens, request.top_k, rng), request, rng)


def route_by_counts(counts: IntArray, request: RoutingRequest, rng: np.random.Generator) -> IntArray:
    """Deal tokens out so that every expert gets so many assignments.

    Args:
        counts: int64 ``[num_experts]``, at most ``num_tokens`` each; below ``num_tokens * top_k`` in all, some are left
            out.
        request: the tokens to route.
        rng: shuffles them.

    Returns:
        int64 ``[num_tokens, top_k]``, different experts per token, -1 for none, tokens in shuffled order.
    """
    # Column by column through the experts' blocks: a block is at most num_tokens long, so no row meets one twice.
    order = rng.permutation(request.num_experts)
    blocks = np.full(request.num_tokens * request.top_k, -1, dtype=np.int64)
    blocks[: counts.sum()] = np.repeat(order, counts[order])
    table = blocks.reshape(request.top_k, request.num_tokens).T
    shuffled: IntArray = rng.permuted(table[rng.permutation(request.num_tokens)], axis=1).astype(np.int64)
    return shuffled


def exact_counts(shares: FloatArray, num_tokens: int, top_k: int, rng: np.random.Generator) -> IntArray:
    """Round shares to counts by largest remainder, ties broken at random.

    Args:
        shares: float64 ``[num_experts]``, summing to 1.
        num_tokens: upper limit of every count.
        top_k: the counts sum to ``num_tokens * top_k``.
        rng: breaks ties.

    Returns:
        int64 ``[num_experts]``.
    """
    total = num_tokens * top_k
    wanted = _limit(shares * total, float(num_tokens))
    counts: IntArray = np.floor(wanted + 1e-9).astype(np.int64)
    missing = total - int(counts.sum())
    shuffled = rng.permutation(len(shares))
    room = shuffled[counts[shuffled] < num_tokens]
    largest_first = room[np.argsort(-(wanted - counts)[room].round(9), kind="stable")]
    counts[largest_first[:missing]] += 1
    return counts


def _limit(wanted: FloatArray, limit: float) -> FloatArray:
    """Cap at ``limit`` and hand what is above to the others in proportion, evenly where they have nothing."""
    capped = np.zeros(len(wanted), dtype=np.bool_)
    while True:
        newly = (wanted > limit) & ~capped
        if not newly.any():
            return wanted
        excess = float((wanted[newly] - limit).sum())
        capped |= newly
        if capped.all():  # every expert takes every token; what is above the limit is a rounding error
            return np.full(len(wanted), limit)
        wanted = np.where(capped, limit, wanted)
        free = np.where(capped, 0.0, wanted)
        if free.sum() == 0:
            free = (~capped).astype(np.float64)
        wanted = wanted + excess * free / free.sum()


class SkippedPoint(Exception):  # noqa: N818  (no error: the experiment says that it may be left out)
    """A point lacks something that it may do without; the message is the reason."""
