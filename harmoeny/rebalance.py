"""HarMoEny's token redistribution: move assignments from overloaded to idle ranks, whole experts' shares at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan, home_executed, home_tokens
from harmoeny.policy import Policy

SENDER_ORDERS = ("local_first", "largest_first")
STOP_RULES = ("covered", "paper")
#: A covered move must shift at least the even load divided by this: less is not worth the link, a slot and a restore.
MIN_MOVE_DIVISOR = 512


@dataclass(kw_only=True)
class TokenHarMoEny(Policy):
    """HarMoEny's policy (arXiv 2506.12417, section 4.1, algorithm 1).

    While some rank has more than the average load, the most popular expert of the most loaded rank gives assignments to
    the least loaded rank, until the one is down to the average or the other is up to it. The paper stops when the least
    loaded rank cannot take ``threshold`` more, or the most popular expert has fewer than ``threshold`` there: the move
    would not pay for its fetch. We go on as long as the next fetch costs nothing, see ``stop_rule``.

    Attributes:
        threshold: tokens that are worth a fetch (the authors' ``eq_tokens``); null derives it by calibration.
        stop_rule: ``paper``, or ``covered``: a move that does not pay for its fetch is made all the same if the
            receiver holds the weights, or if it has so much other work that all its fetches, one after another, end
            before that does (``threshold`` tokens take as long as a fetch) and the move is worth the trouble
            (``MIN_MOVE_DIVISOR``). So every move of the paper is made, and the largest load is at most the paper's.
        sender_order: whose tokens move. ``largest_first`` is the paper's order; ``local_first`` leaves as many as
            possible on the rank where they are, which gives the same loads with the least possible traffic.
    """

    name: ClassVar[str] = "harmoeny_tokens"
    description: ClassVar[str] = (
        "the paper's rule: tokens move from overloaded to idle ranks, which fetch their experts"
    )
    baseline: ClassVar[bool] = False

    threshold: int | None = None
    stop_rule: str = "covered"
    sender_order: str = "local_first"

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a threshold below 1, an unknown stop rule or sender order.
        """
        super().validate()
        if self.threshold is not None and self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold}, must be at least 1, or null to calibrate it")
        if self.stop_rule not in STOP_RULES:
            raise ValueError(f"stop_rule: {self.stop_rule!r}, must be one of {', '.join(STOP_RULES)}")
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
        home = placement.home
        moves = self._moves(counts, placement)
        tokens = home_tokens(counts, home)
        move_tokens(tokens, moves, counts, home, self.sender_order == "local_first")
        fetch = np.zeros_like(placement.resident)
        fetch[moves[:, 0], moves[:, 1]] = True
        return Plan(tokens=tokens, fetch=fetch & ~placement.resident)

    def executed(self, counts: IntArray, placement: Placement) -> IntArray | None:
        """Return int64 ``[num_experts, world_size]`` of the plan, if tokens stay where they are as far as possible."""
        if self.sender_order != "local_first":
            return None
        executed = home_executed(counts, placement)
        experts, receivers, amounts = self._moves(counts, placement).T
        np.subtract.at(executed, (experts, placement.home[experts]), amounts)
        np.add.at(executed, (experts, receivers), amounts)
        return executed

    def _moves(self, counts: IntArray, placement: Placement) -> IntArray:
        if self.threshold is None:
            raise ValueError("threshold: null, must be calibrated before planning (TokenHarMoEny.calibrated)")
        covered = self.stop_rule == "covered"
        moves: IntArray = choose_moves(counts, placement.home, placement.resident, self.threshold, covered)
        return moves


@compiled
def choose_moves(counts: IntArray, home: IntArray, resident: BoolArray, threshold: int, covered: bool) -> IntArray:
    """Run the paper's loop under one of the stop rules; every move costs O(world_size + num_experts).

    A rank that starts above the average only gives and never falls below it, the others only receive and never exceed
    it. So whatever an overloaded rank executes is an expert of its own, and every move is the last of its giver, of its
    receiver or of its expert at home.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``; only the rule ``covered`` asks for it.
        threshold: tokens worth a fetch, at least 1.
        covered: the stop rule is ``covered``, not ``paper``.

    Returns:
        int64 ``[num_moves, 3]``: expert, receiver and number of tokens, in order; an expert moves from its home rank,
        and to one receiver at most once.
    """
    world_size, num_experts = counts.shape
    at_home = counts.sum(axis=0)
    load = np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        load[home[expert]] += at_home[expert]
    target = (load.sum() + world_size - 1) // world_size

    moves = np.empty((world_size + num_experts, 3), dtype=np.int64)
    num_moves = 0
    num_fetches = np.zeros(world_size, dtype=np.int64)
    while True:
        over = load.argmax()
        under = load.argmin()
        if load[over] <= target:
            break
        popular = -1
        for expert in range(num_experts):
            if home[expert] == over and (popular < 0 or at_home[expert] > at_home[popular]):
                popular = expert
        amount = min(load[over] - target, target - load[under], at_home[popular])
        pays = target - load[under] >= threshold and at_home[popular] >= threshold
        held = covered and resident[popular, under]
        if not pays and not held:
            hidden = (num_fetches[under] + 1) * threshold <= load[under]
            if not (covered and hidden and amount * MIN_MOVE_DIVISOR >= target):
                break
        at_home[popular] -= amount
        load[over] -= amount
        load[under] += amount
        num_fetches[under] += not resident[popular, under]
        moves[num_moves] = (popular, under, amount)
        num_moves += 1
    return moves[:num_moves]


@compiled
def move_tokens(tokens: IntArray, moves: IntArray, counts: IntArray, home: IntArray, local_first: bool) -> None:
    """Decide whose tokens every move takes.

    Args:
        tokens: int64 ``[world_size, num_experts, world_size]``, everything at home; updated.
        moves: int64 ``[num_moves, 3]``, from :func:`choose_moves`.
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        local_first: take a receiver's own tokens first and the home rank's last; otherwise the largest senders first.
    """
    world_size, num_experts = counts.shape
    left = np.empty((num_experts, world_size), dtype=np.int64)  # at home, per sender; rows of moved experts only
    for expert, _, _ in moves:
        left[expert] = counts[:, expert]
    remaining = moves[:, 2].copy()
    if local_first:
        # All receivers before anybody else: one receiver's move must not take what is another's own.
        for i, (expert, receiver, _) in enumerate(moves):
            remaining[i] -= _take(tokens, left, expert, home[expert], receiver, receiver, remaining[i])
    for i, (expert, receiver, _) in enumerate(moves):
        while remaining[i] > 0:
            sender = _largest(left[expert], home[expert] if local_first else -1)
            remaining[i] -= _take(tokens, left, expert, home[expert], receiver, sender, remaining[i])


@compiled
def _largest(left: IntArray, last: int) -> int:
    """Return the sender with the most tokens left (int64 ``[world_size]``); ``last`` only where no other has any."""
    largest = last
    most = 0
    for sender in range(left.shape[0]):
        if sender != last and left[sender] > most:
            largest = sender
            most = left[sender]
    return largest


@compiled
def _take(tokens: IntArray, left: IntArray, expert: int, giver: int, receiver: int, sender: int, amount: int) -> int:
    """Move up to ``amount`` of one sender's tokens from giver to receiver and return how many."""
    n: int = min(amount, left[expert, sender])
    left[expert, sender] -= n
    tokens[sender, expert, giver] -= n
    tokens[sender, expert, receiver] += n
    return n
