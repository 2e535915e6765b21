"""HarMoEny's token redistribution: move assignments from overloaded to idle ranks, whole experts' shares at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numba
import numpy as np

from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import ExpertCost, Policy

SENDER_ORDERS = ("local_first", "largest_first")


@dataclass(kw_only=True)
class HarMoEny(Policy):
    """HarMoEny's policy (arXiv 2506.12417, section 4.1, algorithm 1).

    While some rank has more than the average load, the most popular expert of the most loaded rank gives assignments to
    the least loaded rank, until the one is down to the average or the other is up to it. It stops when the least loaded
    rank cannot take ``threshold`` more, or the most popular expert has fewer than ``threshold`` on the overloaded rank.

    Attributes:
        threshold: tokens that are worth a fetch (the authors' ``eq_tokens``); null derives it by calibration.
        sender_order: whose tokens move first. ``largest_first`` is the paper's order; ``local_first`` takes the
            receiver's own tokens first and the overloaded rank's last, which gives the same loads with less traffic.
    """

    name: ClassVar[str] = "harmoeny"
    description: ClassVar[str] = "moves tokens from overloaded to idle ranks in every batch and fetches their experts"
    baseline: ClassVar[bool] = False

    threshold: int | None = None
    sender_order: str = "local_first"

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a threshold below 1 or an unknown sender order.
        """
        super().validate()
        if self.threshold is not None and self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold}, must be at least 1, or null to calibrate it")
        if self.sender_order not in SENDER_ORDERS:
            raise ValueError(f"sender_order: {self.sender_order!r}, must be one of {', '.join(SENDER_ORDERS)}")

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the threshold that the machine's costs give, unless it was set."""
        return self if self.threshold is not None else replace(self, threshold=cost.threshold_tokens())

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Redistribute ``counts`` (int64 ``[world_size, num_experts]``).

        Raises:
            ValueError: the threshold was neither set nor calibrated.
        """
        if self.threshold is None:
            raise ValueError("threshold: null, must be calibrated before planning (HarMoEny.calibrated)")
        tokens, fetch = rebalance(
            counts, placement.home, placement.resident, self.threshold, self.sender_order == "local_first"
        )
        return Plan(tokens=tokens, fetch=fetch)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]  # numba ships no types
def rebalance(
    counts: IntArray, home: IntArray, resident: BoolArray, threshold: int, local_first: bool
) -> tuple[IntArray, BoolArray]:
    """Run the redistribution; every move costs O(world_size + num_experts).

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        threshold: tokens worth a fetch, at least 1.
        local_first: move the receiver's own tokens first and the overloaded rank's last.

    Returns:
        ``tokens`` int64 ``[world_size, num_experts, world_size]`` and ``fetch`` bool ``[num_experts, world_size]``.
    """
    world_size, num_experts = counts.shape
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    executed = np.zeros((world_size, num_experts), dtype=np.int64)  # rank-major: one row is scanned per move
    load = np.zeros(world_size, dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            n = counts[src, expert]
            if n:
                dst = home[expert]
                tokens[src, expert, dst] = n
                executed[dst, expert] += n
                load[dst] += n
    target = (load.sum() + world_size - 1) // world_size

    while True:
        over = load.argmax()
        under = load.argmin()
        if load[over] <= target or target - load[under] < threshold:
            break
        expert = executed[over].argmax()
        available = executed[over, expert]
        if available < threshold:
            break
        amount = min(load[over] - target, target - load[under], available)
        _move(tokens[:, expert, :], over, under, amount, local_first)
        executed[over, expert] -= amount
        executed[under, expert] += amount
        load[over] -= amount
        load[under] += amount
        if not resident[expert, under]:
            fetch[expert, under] = True
        if executed[over, expert] == 0:
            # A rank that gave away all that it had been given needs the weights no longer.
            fetch[expert, over] = False
    return tokens, fetch


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _move(share: IntArray, over: int, under: int, amount: int, local_first: bool) -> None:
    """Move ``amount`` assignments of one expert from rank ``over`` to ``under``; ``share``: ``[src, dst]``, updated."""
    world_size = share.shape[0]
    if local_first:
        amount = _take(share, under, over, under, amount)
    while amount > 0:
        largest = -1
        for src in range(world_size):
            if local_first and src == over:
                continue
            if share[src, over] > 0 and (largest < 0 or share[src, over] > share[largest, over]):
                largest = src
        if largest < 0:
            break
        amount = _take(share, largest, over, under, amount)
    if amount > 0:
        _take(share, over, over, under, amount)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _take(share: IntArray, src: int, over: int, under: int, amount: int) -> int:
    """Move up to ``amount`` of one sender's assignments and return what is left to move."""
    n: int = min(amount, share[src, over])
    share[src, over] -= n
    share[src, under] += n
    return amount - n
