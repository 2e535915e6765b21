"""What a policy may know is what it is given: asking for more is refused, history lacks the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from baselines.eplb import EPLB
from experiments.registry import discover
from harmoeny.choices import Knowledge
from harmoeny.placement import BoolArray, IntArray, Placement, place
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import BlindPolicy, Policy, check_knowledge
from harmoeny.runtime.layer.residency import Residency

NOTHING: frozenset[Knowledge] = frozenset()


@dataclass(kw_only=True)
class Peeking(BlindPolicy):
    """Says that it knows history, and plans by the batch."""

    name: ClassVar[str] = "peeking"
    description: ClassVar[str] = "for the test"

    def serving(self, placement: Placement) -> BoolArray:
        return placement.resident

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        return plan_from_tokens(home_tokens(counts, placement.home), placement)


@dataclass(kw_only=True)
class PeekingAtShares(BlindPolicy):
    """Says that it knows history, and chooses the shares by the batch."""

    name: ClassVar[str] = "peeking_at_shares"
    description: ClassVar[str] = "for the test"

    def serving(self, placement: Placement) -> BoolArray:
        return placement.resident

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        return np.where(placement.resident, counts.sum(axis=0)[:, None], 0)


@dataclass(kw_only=True)
class Learning(EPLB):
    """Says that it knows nothing, and learns."""

    name: ClassVar[str] = "learning"
    knows: ClassVar[frozenset[Knowledge]] = NOTHING


@dataclass(kw_only=True)
class Fitting(BlindPolicy):
    """Says that it knows nothing, and wants calibration batches."""

    name: ClassVar[str] = "fitting"
    description: ClassVar[str] = "for the test"
    knows: ClassVar[frozenset[Knowledge]] = NOTHING

    @property
    def calibration_batches(self) -> int:
        return 1

    def serving(self, placement: Placement) -> BoolArray:
        return placement.resident


@dataclass(kw_only=True)
class Foreseeing(BlindPolicy):
    """Says that it knows nothing, and looks at a layer to place the next one's experts."""

    name: ClassVar[str] = "foreseeing"
    description: ClassVar[str] = "for the test"
    knows: ClassVar[frozenset[Knowledge]] = NOTHING

    def serving(self, placement: Placement) -> BoolArray:
        return placement.resident

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement:  # noqa: ARG002
        return following


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Peeking(), "knows: history, must have exact for peeking, which plans for itself"),
        (PeekingAtShares(), "knows: history, must have exact for peeking_at_shares, which plans for itself"),
        (Learning(), "knows: nothing, must have history for learning, which learns from earlier batches"),
        (Fitting(), "knows: nothing, must have history for fitting, which learns from earlier batches"),
        (Foreseeing(), "knows: nothing, must have lookahead for foreseeing, which places experts ahead of the gate"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_policy_that_asks_for_more_is_refused_before_and_by_the_runtime(policy: Policy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.validate()
    with pytest.raises(ValueError, match=message):
        Residency(policy, [place("contiguous", 4, 2)])


@pytest.mark.parametrize("name", sorted(discover("system")[0]))
def test_every_system_asks_for_no_more_than_it_says(name: str) -> None:
    check_knowledge(discover("system")[0][name]())


def test_history_never_holds_the_batch_that_is_planned() -> None:
    seen: list[list[int]] = []

    @dataclass(kw_only=True)
    class Noting(Peeking):
        plan = BlindPolicy.plan
        history_window = 9

        def update_placement(self, layer: int, history: Sequence[IntArray], placement: Placement) -> None:  # noqa: ARG002
            seen.append([int(counts.sum()) for counts in history])

    residency = Residency(Noting(), [place("contiguous", 4, 2)])
    for batch in range(3):
        residency.update(0, np.full((2, 4), batch + 1, dtype=np.int64))
    assert seen == [[], [8], [8, 16]]


def test_shares_of_a_blind_policy_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    policy = EPLB(redundant_experts_per_rank=2)
    placement = policy.place(0, 8, 4)
    copies = placement.resident.sum(axis=1)
    for _ in range(20):
        counts = rng.integers(0, 1000, (4, 8))
        shares = policy.plan(counts, placement).executed()
        even = np.where(placement.resident, (counts.sum(axis=0) / copies)[:, None], 0.0)
        assert np.abs(shares - even).max() < 1
