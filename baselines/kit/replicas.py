"""What systems share that hold replicas of heavy experts and place them anew from time to time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from harmoeny.choices import Fetch
from harmoeny.placement import BoolArray, IntArray, Placement, even_room
from harmoeny.policy import BlindPolicy

FloatArray = npt.NDArray[np.float64]


@dataclass(kw_only=True)
class ReplicatingPolicy(BlindPolicy):
    """Replicas on every rank, which share their expert's assignments evenly.

    Every rank has room for ``ceil(num_experts / world_size) + redundant_experts_per_rank`` experts, all of it used.

    Attributes:
        redundant_experts_per_rank: room for replicas on every rank.
    """

    redundant_experts_per_rank: int = 1

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        self._at_least(redundant_experts_per_rank=0)

    def _at_least(self, **bounds: int) -> None:
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least {least}")

    @abstractmethod
    def is_due(self, layer: int, num_batches: int) -> bool:
        """Return whether a layer is placed anew before the batch that follows ``num_batches``, which are at least 1."""

    def expected_load(self, history: Sequence[IntArray]) -> IntArray | FloatArray:
        """Return ``[num_experts]``, what is expected of the next batches: the sum over the window."""
        load: IntArray = np.sum(history[-self.history_window :], axis=(0, 1))
        return load

    @abstractmethod
    def rearranged(self, load: IntArray | FloatArray, placement: Placement, num_slots: int) -> Placement | None:
        """Return the placement for an expected load; None: the present one is good enough.

        Args:
            load: ``[num_experts]``.
            placement: the present one.
            num_slots: experts that every rank has room for.
        """

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        """Return the homes of ``placement``; free slots take one more replica of expert 0, 1, ... in turn.

        Raises:
            ValueError: too few slots.
        """
        placement = super().place(layer, num_experts, world_size)
        if self.fetch == Fetch.NONE:
            return placement
        num_slots = self.held(num_experts, world_size)
        resident = placement.resident.copy()
        expert = 0
        for rank in range(world_size):
            while resident[:, rank].sum() < num_slots:
                resident[expert, rank] = True
                expert = (expert + 1) % num_experts
        return Placement(home=placement.home, resident=resident)

    def held(self, num_experts: int, world_size: int) -> int:
        """Return the experts that every rank holds.

        Raises:
            ValueError: there are fewer slots.
        """
        held = even_room(num_experts, world_size, self.redundant_experts_per_rank)
        if self.num_slots is not None and self.num_slots < held:
            raise ValueError(f"num_slots: {self.num_slots}, must be at least {held}, the experts that a rank holds")
        return held

    def with_spare_slots(self, spare_slots: int, num_experts: int, world_size: int) -> Self:
        """Return the policy with so many redundant experts on every rank."""
        roomy = super().with_spare_slots(spare_slots, num_experts, world_size)
        return replace(roomy, redundant_experts_per_rank=spare_slots)

    def update_placement(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:
        """Place a layer anew where that is due.

        Args:
            layer: MoE layer in order of execution; layers are balanced independently.
            history: int64 ``[world_size, num_experts]`` per earlier batch, oldest first.
            placement: the present residency.

        Returns:
            The new residency, or None where it is not due or nothing would change.
        """
        if self.fetch == Fetch.NONE or not history or not self.is_due(layer, len(history)):
            return None
        num_slots = self.held(placement.num_experts, placement.world_size)
        new = self.rearranged(self.expected_load(history), placement, num_slots)
        if new is None or np.array_equal(new.resident, placement.resident):
            return None
        return new

    def serving(self, placement: Placement) -> BoolArray:
        """Return bool ``[num_experts, world_size]``: all replicas."""
        return placement.resident


@dataclass(kw_only=True)
class PeriodicPolicy(ReplicatingPolicy):
    """Replicas that are placed anew after the first batch and then every few, all layers at once.

    Attributes:
        window: latest batches whose counts are added up as the expected load.
        interval: batches between two re-placements.
    """

    window: int = 4
    interval: int = 4

    @property
    def history_window(self) -> int:
        """Batches whose counts are added up."""
        return self.window

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        self._at_least(window=1, interval=1)

    def is_due(self, layer: int, num_batches: int) -> bool:  # noqa: ARG002  (all layers at once)
        """Return whether this follows the first batch, or a multiple of ``interval`` after it."""
        return (num_batches - 1) % self.interval == 0
