"""What only a model of the runtime asks of a policy: optional, each a protocol of its own.

A policy that has none of these methods is modelled from its plans.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from harmoeny.lines import Stages
from harmoeny.placement import BoolArray, IntArray, Placement


@runtime_checkable
class PadsBuffers(Protocol):
    """A policy whose system fills its buffers to equal size; without this, exactly the assignments are sent."""

    def capacity(self, counts: IntArray) -> int:
        """Return how many rows every rank sends every expert; ``counts``: int64 ``[world_size, num_experts]``."""


@runtime_checkable
class PredictsExecuted(Protocol):
    """A policy that knows what ranks execute without making a plan.

    The simulator asks where a plan has no room in memory: with a thousand ranks ``Plan.tokens`` takes gigabytes.
    """

    def executed(self, counts: IntArray, placement: Placement) -> IntArray | None:
        """Return int64 ``[num_experts, world_size]``, what ``plan(counts, placement).executed()`` would be.

        A policy may answer only if its ranks execute as many of their own assignments as its loads allow; None says
        that, with its present options, nothing but the plan will do.

        Args:
            counts: int64 ``[world_size, num_experts]``.
            placement: the experts that every rank holds.
        """


class ChosenShares(Protocol):
    """What a plan would be without who executes whose assignments."""

    @property
    def shares(self) -> IntArray:
        """Return int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first."""

    @property
    def from_peer(self) -> BoolArray:
        """Return bool ``[num_experts, world_size]``, as of a plan."""

    @property
    def senders(self) -> IntArray:
        """Return int64 ``[num_experts, world_size]``, as of a plan, or of no size: home ranks."""

    @property
    def halved(self) -> BoolArray:
        """Return bool ``[num_experts, world_size]``, as of a plan, or of no size: none."""

    @property
    def overlapped(self) -> bool:
        """Return whether a rank's own rows are executed while all others are on their way."""

    @property
    def stages(self) -> Stages:
        """Return the stages as of a plan, or of no size: there is one."""

    @property
    def predicted_s(self) -> float:
        """Return what a plan has."""

    @property
    def node_ranks(self) -> int:
        """Return the ranks of a node, whose rows stay on it where they can; 0: nodes do not matter."""


@runtime_checkable
class ChoosesShares(PredictsExecuted, Protocol):
    """A policy that also says where fetches come from, and whether exchange and computation overlap."""

    def choose(self, counts: IntArray, placement: Placement) -> ChosenShares:
        """Return what ``plan(counts, placement)`` would be; ``counts``: int64 ``[world_size, num_experts]``."""
