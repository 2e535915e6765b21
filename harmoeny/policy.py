"""The one thing that a system under test must provide: a policy that turns counts into a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from harmoeny.placement import PLACEMENTS, IntArray, Placement, place
from harmoeny.plan import Plan


@dataclass(frozen=True)
class ExpertCost:
    """What executing and moving one expert costs on the present machine, as calibration measured it.

    Attributes:
        token_s: seconds to execute one more token, in a slice of many.
        fetch_s: seconds to bring one expert's weights to a rank.
    """

    token_s: float
    fetch_s: float

    def threshold_tokens(self) -> int:
        """Return the smallest number of tokens whose computation takes as long as one fetch (paper, section 4.2)."""
        return max(1, -int(-self.fetch_s // self.token_s))


@dataclass(kw_only=True)
class Policy(ABC):
    """A policy: pure, deterministic, the same on every rank.

    A subclass is a keyword-only dataclass whose fields are its configuration: they become the options
    ``systems.<name>.<field>`` of the command line. It must not read a clock, a global or unseeded randomness.

    Attributes:
        placement: where experts live before any batch: ``contiguous`` or ``round_robin``.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    #: False for a policy that may drop assignments.
    exact: ClassVar[bool] = True
    #: False for our own systems, which the others are compared with.
    baseline: ClassVar[bool] = True

    placement: str = "contiguous"

    def validate(self) -> None:
        """Check the configuration before any worker starts.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement: {self.placement!r}, must be one of {', '.join(PLACEMENTS)}")

    def calibrated(self, cost: ExpertCost) -> Self:  # noqa: ARG002  (for policies that have a cost model)
        """Return the policy with what it left open filled in from the machine's costs."""
        return self

    def place(self, num_experts: int, world_size: int) -> Placement:
        """Return the residency before the first batch."""
        return place(self.placement, num_experts, world_size)

    @abstractmethod
    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Decide where every assignment is executed.

        Args:
            counts: int64 ``[world_size, num_experts]``, C-contiguous, assignments per source rank and expert.
            placement: the experts that every rank holds.

        Returns:
            A plan that keeps the invariants of :meth:`Plan.validate`.
        """
