from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from tests.strategies import batches, even_load, examples

small_batches = batches(max_world_size=5, max_experts=6, max_tokens=30)
seeds = st.integers(0, 2**32 - 1)


def random_plan(counts: IntArray, placement: Placement, seed: int) -> Plan:
    """Send every sender's assignments to ranks at random."""
    world_size = counts.shape[0]
    rng = np.random.default_rng(seed)
    tokens = rng.multinomial(counts, np.full(world_size, 1 / world_size)).astype(np.int64)
    return plan_from_tokens(tokens, placement)


def pick(where: BoolArray, seed: int) -> tuple[int, ...]:
    """Choose one of the true places; an example without any is no example."""
    places = np.argwhere(where)
    assume(len(places) > 0)
    return tuple(int(i) for i in places[np.random.default_rng(seed).integers(len(places))])


@examples()
@given(batch=small_batches, seed=seeds)
def test_sums_of_a_plan(batch: tuple[IntArray, Placement], seed: int) -> None:
    counts, placement = batch
    plan = random_plan(counts, placement, seed)
    ranks, experts = range(counts.shape[0]), range(counts.shape[1])
    cell = plan.tokens.tolist()
    executed = [[sum(cell[s][e][d] for s in ranks) for d in ranks] for e in experts]
    load = [sum(executed[e][d] for e in experts) for d in ranks]
    assert (plan.world_size, plan.num_experts) == counts.shape
    assert plan.executed().tolist() == executed
    assert plan.load().tolist() == load
    total = sum(load)
    imbalance = Fraction(max(load) * len(load), total) if total else Fraction(1)
    assert plan.imbalance() == pytest.approx(float(imbalance), rel=1e-12)
    for e in experts:
        for d in ranks:
            assert plan.fetch[e, d] == (executed[e][d] > 0 and not placement.resident[e, d])

    kept = plan.tokens // 2
    lost = [[int(counts[s, e]) - sum(n // 2 for n in cell[s][e]) for e in experts] for s in ranks]
    assert replace(plan, tokens=kept).dropped(counts).tolist() == lost


@examples()
@given(batch=small_batches)
def test_home_tokens(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    tokens = home_tokens(counts, placement.home)
    for (src, expert, dst), n in np.ndenumerate(tokens):
        assert n == (counts[src, expert] if dst == placement.home[expert] else 0)


@given(total=st.integers(0, 10**6), world_size=st.integers(1, 100))
def test_even_load_is_the_least_that_holds_everything(total: int, world_size: int) -> None:
    load = even_load(total, world_size)
    assert load * world_size >= total > (load - 1) * world_size


def test_validate_accepts_a_good_plan_and_names_what_is_wrong_with_others() -> None:
    counts = np.array([[3, 1], [0, 2]])
    placement = Placement.from_home(np.array([0, 1]), 2)
    tokens = np.array([[[2, 1], [0, 1]], [[0, 0], [0, 2]]])
    good = plan_from_tokens(tokens, placement)
    assert good.fetch.tolist() == [[False, True], [False, False]]
    good.validate(counts, placement)
    assert good.imbalance() == pytest.approx(4 / 3)

    # One assignment more on rank 1, which it executed before there was a plan.
    early = np.array([[0, 0], [0, 1]])
    begun = replace(good, early=early)
    begun.validate(counts + early, placement)
    with pytest.raises(ValueError, match=r"more assignments than counted at \[src, expert\] = \[1, 1\]"):
        begun.validate(counts, placement)
    with pytest.raises(ValueError, match=r"assignments lost at \[src, expert\] = \[1, 1\]"):
        good.validate(counts + early, placement)
    with pytest.raises(ValueError, match=r"plan.early: negative at \[rank, expert\] = \[1, 1\]"):
        replace(good, early=-early).validate(counts, placement)

    with pytest.raises(ValueError, match=r"plan.tokens: shape \(2, 2, 2\) does not fit counts \(2, 3\)"):
        good.validate(np.zeros((2, 3), dtype=np.int64), placement)
    with pytest.raises(ValueError, match=r"plan.fetch: shape \(1, 2\), must be \(2, 2\)"):
        replace(good, fetch=good.fetch[:1]).validate(counts, placement)


@examples()
@given(batch=small_batches, seed=seeds)
def test_validate_finds_one_wrong_number(batch: tuple[IntArray, Placement], seed: int) -> None:
    counts, placement = batch
    plan = random_plan(counts, placement, seed)
    plan.validate(counts, placement)
    src, expert, dst = pick(np.ones_like(plan.tokens, dtype=np.bool_), seed)

    tokens = plan.tokens.copy()
    tokens[src, expert, dst] = -1
    with pytest.raises(ValueError, match=rf"negative at \[src, expert, dst\] = \[{src}, {expert}, {dst}\]"):
        replace(plan, tokens=tokens).validate(counts, placement, exact=False)

    tokens = plan.tokens.copy()
    tokens[src, expert, dst] += 1
    with pytest.raises(ValueError, match=rf"more assignments than counted at \[src, expert\] = \[{src}, {expert}\]"):
        replace(plan, tokens=tokens).validate(counts, placement, exact=False)


@examples()
@given(batch=small_batches, seed=seeds)
def test_validate_finds_a_lost_assignment(batch: tuple[IntArray, Placement], seed: int) -> None:
    counts, placement = batch
    plan = random_plan(counts, placement, seed)
    src, expert, dst = pick(plan.tokens > 0, seed)
    tokens = plan.tokens.copy()
    tokens[src, expert, dst] -= 1
    short = plan_from_tokens(tokens, placement)
    short.validate(counts, placement, exact=False)
    with pytest.raises(ValueError, match=rf"assignments lost at \[src, expert\] = \[{src}, {expert}\]"):
        short.validate(counts, placement)


@examples()
@given(batch=small_batches, seed=seeds)
def test_validate_finds_a_missing_fetch(batch: tuple[IntArray, Placement], seed: int) -> None:
    counts, placement = batch
    plan = random_plan(counts, placement, seed)
    expert, rank = pick(plan.fetch, seed)
    fetch = plan.fetch.copy()
    fetch[expert, rank] = False
    with pytest.raises(ValueError, match=rf"executed without weights at \[expert, rank\] = \[{expert}, {rank}\]"):
        replace(plan, fetch=fetch).validate(counts, placement)


@examples()
@given(batch=small_batches, seed=seeds)
def test_validate_finds_a_needless_fetch(batch: tuple[IntArray, Placement], seed: int) -> None:
    counts, placement = batch
    plan = random_plan(counts, placement, seed)
    expert, rank = pick(~plan.fetch, seed)
    fetch = plan.fetch.copy()
    fetch[expert, rank] = True
    with pytest.raises(ValueError, match=rf"fetched without need at \[expert, rank\] = \[{expert}, {rank}\]"):
        replace(plan, fetch=fetch).validate(counts, placement)
