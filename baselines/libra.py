"""Libra: replicas for the next layer, ahead of need, by a prediction of where its tokens will go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from harmoeny.choices import Fetch, Knowledge
from harmoeny.compiled import compiled
from harmoeny.following import accuracy, expect, transitions
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement, even_room
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.trace import RoutingTrace

#: Remote assignments move in amounts of at least the mean load over this.
_LEAST_MOVE_DIVISOR = 256


@dataclass(kw_only=True)
class Libra(Policy):
    """Libra (ICLR 2026; github.com/SNU-ARC/Libra): the next layer's replicas are on their way while a layer computes.

    Every rank first imports what its own tokens are predicted to want, then the most loaded ranks' hottest experts go
    to the least loaded ones. Once the gate has spoken, assignments whose expert is on their own rank stay there and are
    executed at once; the others are shared by the ranks that hold their expert.

    The prediction is ours: how often tokens went from an expert to each of the next layer's in the calibration batches,
    applied to the present layer's counts.

    Attributes:
        spare_slots: experts that a rank imports, and has memory for.
        own_share: share of the slots for experts that the rank's own tokens want.
    """

    name: ClassVar[str] = "libra"
    can_stage: ClassVar[bool] = False
    description: ClassVar[str] = "replicas for the next layer by a prediction, copied while a layer computes"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.LOOKAHEAD, Knowledge.EXACT})

    spare_slots: int = 2
    own_share: float = 0.5

    def __post_init__(self) -> None:
        #: Per layer, float64 ``[num_experts, num_experts]``: where an assignment to an expert goes in the next layer;
        #: None where there is none with the same tokens. No option.
        self.following: list[FloatArray | None] = []
        #: On calibration tokens that it was not fitted to: the share of a token's experts that were predicted, and the
        #: share of assignments that were predicted for the right expert.
        self.accuracy: dict[str, float] = {}

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number of slots below 0, or a share that is none.
        """
        super().validate()
        if self.spare_slots < 0:
            raise ValueError(f"spare_slots: {self.spare_slots}, must be at least 0")
        if not 0 <= self.own_share <= 1:
            raise ValueError(f"own_share: {self.own_share}, must be between 0 and 1")

    @property
    def calibration_batches(self) -> int:
        """Batches that say what follows what."""
        return 4

    def fitted(self, trace: RoutingTrace, num_experts: int, world_size: int) -> Self:  # noqa: ARG002
        """Return the policy with what follows what, and how well that predicts."""
        fitted = replace(self)
        fitted.following = transitions(trace, num_experts)
        fitted.accuracy = accuracy(trace, num_experts)
        return fitted

    def fit_report(self) -> dict[str, float]:
        """Return the accuracy on tokens that the prediction was not fitted to."""
        return self.accuracy

    def room(self, num_experts: int, world_size: int) -> int | None:
        """Return the experts that a rank has room for: its own and the spare slots, unless it is set."""
        if self.num_slots is not None or self.fetch == Fetch.NONE:
            return self.num_slots
        return even_room(num_experts, world_size, self.spare_slots)

    def with_spare_slots(self, spare_slots: int, num_experts: int, world_size: int) -> Self:  # noqa: ARG002
        """Return the policy with so many spare slots on every rank."""
        return replace(self, spare_slots=spare_slots)

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement | None:
        """Choose the next layer's replicas; None where nothing predicts its tokens.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
            following: the present residency of the next layer.
        """
        if layer >= len(self.following) or self.fetch == Fetch.NONE:
            return None
        then = self.following[layer]
        if then is None:
            return None
        resident = import_experts(expect(counts, then), following.home, self.spare_slots, self.own_share)
        return None if np.array_equal(resident, following.resident) else Placement(following.home, resident)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Execute ``counts`` (int64 ``[world_size, num_experts]``) where they are, or where their expert is held."""
        tokens = share_remote(counts, placement.home, placement.resident)
        groups = [list(range(len(counts)))] if len(counts) > 1 else None
        return Plan(tokens=tokens, fetch=np.zeros_like(placement.resident), source_groups=groups)


@compiled
def import_experts(expected: FloatArray, home: IntArray, num_slots: int, own_share: float) -> BoolArray:
    """Choose what every rank imports: what its own tokens want, then what relieves the most loaded ranks.

    Args:
        expected: float64 ``[world_size, num_experts]``, predicted assignments.
        home: int64 ``[num_experts]``.
        num_slots: experts that a rank imports at most.
        own_share: share of the slots for the first kind.

    Returns:
        bool ``[num_experts, world_size]``, homes and imports.
    """
    world_size, num_experts = expected.shape
    resident = np.zeros((num_experts, world_size), dtype=np.bool_)
    at_home = np.zeros(num_experts)  # what an expert's home still executes of it
    load = np.zeros(world_size)
    for expert in range(num_experts):
        resident[expert, home[expert]] = True
        at_home[expert] = expected[:, expert].sum()
        load[home[expert]] += at_home[expert]
    free = np.full(world_size, num_slots, dtype=np.int64)
    for rank in range(world_size):
        for _ in range(int(num_slots * own_share)):
            wanted = -1
            for expert in range(num_experts):
                if not resident[expert, rank] and (wanted < 0 or expected[rank, expert] > expected[rank, wanted]):
                    wanted = expert
            if wanted < 0 or expected[rank, wanted] <= 0:
                break
            resident[wanted, rank] = True
            free[rank] -= 1
            load[rank] += expected[rank, wanted]
            load[home[wanted]] -= expected[rank, wanted]
            at_home[wanted] -= expected[rank, wanted]
    while True:
        over = load.argmax()
        under = -1
        for rank in range(world_size):
            if free[rank] > 0 and rank != over and (under < 0 or load[rank] < load[under]):
                under = rank
        hottest = -1
        for expert in range(num_experts):
            imports = under >= 0 and home[expert] == over and not resident[expert, under] and at_home[expert] > 0
            if imports and (hottest < 0 or at_home[expert] > at_home[hottest]):
                hottest = expert
        if hottest < 0 or load[over] <= load[under]:
            return resident
        amount = min(at_home[hottest], (load[over] - load[under]) / 2)
        resident[hottest, under] = True
        free[under] -= 1
        load[over] -= amount
        load[under] += amount
        at_home[hottest] -= amount


@compiled
def share_remote(counts: IntArray, home: IntArray, resident: BoolArray) -> IntArray:
    """Leave assignments where their expert is, and share the others: the most loaded rank's hottest expert first.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.

    Returns:
        int64 ``[world_size(src), num_experts, world_size(dst)]``.
    """
    world_size, num_experts = counts.shape
    remote = np.zeros((num_experts, world_size), dtype=np.int64)  # what ranks execute for others
    load = np.zeros(world_size, dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            dst = src if resident[expert, src] else home[expert]
            load[dst] += counts[src, expert]
            if dst != src:
                remote[expert, dst] += counts[src, expert]
    least = max(1, load.sum() // (world_size * _LEAST_MOVE_DIVISOR))
    while True:
        over = int(load.argmax())
        moved = target = -1
        for expert in range(num_experts):
            if remote[expert, over] < least or (moved >= 0 and remote[expert, over] <= remote[moved, over]):
                continue
            best = over
            for rank in range(world_size):
                if resident[expert, rank] and load[rank] < load[best]:
                    best = rank
            if load[over] - load[best] >= 2 * least:
                moved, target = expert, best
        if moved < 0:
            break
        amount = min(remote[moved, over], (load[over] - load[target]) // 2)
        remote[moved, over] -= amount
        remote[moved, target] += amount
        load[over] -= amount
        load[target] += amount
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    for expert in range(num_experts):
        dst = 0
        for src in range(world_size):
            if resident[expert, src]:
                tokens[src, expert, src] = counts[src, expert]
                continue
            left = counts[src, expert]
            while left > 0:
                n = min(left, remote[expert, dst])
                tokens[src, expert, dst] += n
                remote[expert, dst] -= n
                left -= n
                if remote[expert, dst] == 0:
                    dst += 1
    return tokens
