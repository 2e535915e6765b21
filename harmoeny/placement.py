"""Which experts live on which rank: the state that a plan starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

PLACEMENTS = ("contiguous", "round_robin")


@dataclass(frozen=True)
class Placement:
    """Resident experts of every rank.

    Attributes:
        home: int64 ``[num_experts]``, the rank that every expert belongs to.
        resident: bool ``[num_experts, world_size]``, true where a rank holds the expert's weights; every expert is
            resident at least on its home rank, unless the policy caches (:attr:`harmoeny.policy.Policy.caches`).
        num_shared: the last experts, so many, are shared ones: every rank holds them, every token goes to all of them,
            and no policy sees them.
    """

    home: IntArray
    resident: BoolArray
    num_shared: int = 0

    @property
    def num_experts(self) -> int:
        """Number of experts in the layer."""
        return int(self.resident.shape[0])

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(self.resident.shape[1])

    @property
    def at_home(self) -> BoolArray:
        """True on every expert's home rank, bool ``[num_experts, world_size]``."""
        here: BoolArray = self.home[:, None] == np.arange(self.world_size)
        return here

    @property
    def lacks_homes(self) -> BoolArray:
        """True for every expert that its home rank does not hold, bool ``[num_experts]``."""
        lacking: BoolArray = ~self.resident[np.arange(self.num_experts), self.home]
        return lacking

    @cached_property
    def holds_homes(self) -> bool:
        """Whether every expert is held by its home rank; looked at once, as plans ask in every batch."""
        return not self.lacks_homes.any()

    @property
    def routed(self) -> Placement:
        """The same without the shared experts: what policies get to see."""
        if self.num_shared == 0:
            return self
        return Placement(self.home[: -self.num_shared], self.resident[: -self.num_shared])

    def with_shared(self, num_shared: int) -> Placement:
        """Return the same with shared experts behind the routed ones, at home on rank 0 and resident everywhere."""
        if num_shared == 0:
            return self
        home = np.concatenate([self.home, np.zeros(num_shared, dtype=np.int64)])
        everywhere = np.ones((num_shared, self.world_size), dtype=np.bool_)
        return Placement(home, np.concatenate([self.resident, everywhere]), num_shared)

    def with_residents(self, resident: BoolArray) -> Placement | None:
        """Return the same homes with other residents, or None where they are the same."""
        return None if np.array_equal(resident, self.resident) else Placement(self.home, resident)

    def validate(self, *, complete: bool = True) -> None:
        """Check the invariants.

        Args:
            complete: every expert must be resident on its home rank; otherwise a rank may lack some that are at home
                there, and has them in its host's memory only.

        Raises:
            ValueError: a home rank that does not exist, or that does not hold its expert.
        """
        if self.home.shape != (self.num_experts,):
            raise ValueError(f"placement.home: shape {self.home.shape}, must be ({self.num_experts},)")
        outside = (self.home < 0) | (self.home >= self.world_size)
        if outside.any():
            expert = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"placement.home[{expert}]: rank {int(self.home[expert])}, must be 0 to {self.world_size - 1}"
            )
        if complete and (missing := self.lacks_homes).any():
            expert = int(np.flatnonzero(missing)[0])
            raise ValueError(
                f"placement.resident: expert {expert} is not resident on its home rank {int(self.home[expert])}"
            )

    @classmethod
    def from_home(cls, home: IntArray, world_size: int) -> Placement:
        """Place every expert on its home rank only. ``home``: int64 ``[num_experts]``."""
        resident = np.zeros((home.shape[0], world_size), dtype=np.bool_)
        resident[np.arange(home.shape[0]), home] = True
        return cls(home=home, resident=resident)


def even_room(num_experts: int, world_size: int, spare_slots: int) -> int:
    """Return the experts that every rank has room for: an even share, rounded up, and the spare slots; at most all."""
    return min(-(-num_experts // world_size) + spare_slots, num_experts)


def with_slot(resident: BoolArray, num_slots: IntArray | int) -> BoolArray:
    """Return the residents that have a slot, bool: the first of every rank, where there are more than slots.

    Args:
        resident: bool ``[num_experts]`` of one rank or ``[num_experts, world_size]`` of all.
        num_slots: slots of the rank, or int64 ``[world_size]``.
    """
    kept: BoolArray = resident & (np.cumsum(resident, axis=0) <= num_slots)
    return kept


def hold_fetched(
    scores: npt.NDArray[np.float64], fetched: BoolArray, placement: Placement, num_slots: int
) -> BoolArray:
    """Return bool ``[num_experts, world_size]``: what ranks fetched, in place of their residents with the least scores.

    So nothing has to be copied back. Where there are more fetched ones than slots, those with the least scores stay,
    which are fetched last.

    Args:
        scores: float64 ``[num_experts]``, from 0 to 1; of two alike the first counts.
        fetched: bool ``[num_experts, world_size]``, experts that were fetched to their home ranks.
        placement: the residency before.
        num_slots: slots of a rank.
    """
    held = np.zeros_like(fetched)
    for rank in np.flatnonzero(fetched.any(axis=0)):
        first = np.where(fetched[:, rank], 2.0 - scores, scores)
        allowed = (placement.resident | fetched)[:, rank, None]
        held[:, rank] = hold_highest(first, allowed, num_slots)[:, 0]
    others = ~fetched.any(axis=0)
    held[:, others] = placement.resident[:, others]
    return held


def hold_highest(scores: npt.NDArray[np.float64], allowed: BoolArray, num_slots: IntArray | int) -> BoolArray:
    """Return bool ``[num_experts, world_size]``, the experts with the highest scores that every rank has slots for.

    Args:
        scores: float64 ``[num_experts]``; of two alike the first counts.
        allowed: bool ``[num_experts, world_size]``, what a rank may hold.
        num_slots: slots of a rank, or int64 ``[world_size]``.
    """
    order = np.argsort(-scores, kind="stable")
    held = np.zeros_like(allowed)
    held[order] = with_slot(allowed[order], num_slots)
    return held


def place(kind: str, num_experts: int, world_size: int) -> Placement:
    """Spread ``num_experts`` over ``world_size`` ranks; where they do not divide, the first ranks hold one more.

    Args:
        kind: ``contiguous`` (rank 0 holds experts 0, 1, ...) or ``round_robin`` (expert e on rank e mod world_size).
        num_experts: number of experts, at least 1.
        world_size: number of ranks, at least 1.

    Raises:
        ValueError: an unknown kind.
    """
    experts = np.arange(num_experts, dtype=np.int64)
    if kind == "round_robin":
        return Placement.from_home(experts % world_size, world_size)
    if kind == "contiguous":
        base, extra = divmod(num_experts, world_size)
        sizes = np.full(world_size, base, dtype=np.int64)
        sizes[:extra] += 1
        return Placement.from_home(np.repeat(np.arange(world_size, dtype=np.int64), sizes), world_size)
    raise ValueError(f"placement: {kind!r}, must be one of {', '.join(PLACEMENTS)}")
