from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from baselines.static_ep import StaticEP
from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray, Placement, place
from harmoeny.plan import Plan
from harmoeny.rebalance import MIN_MOVE_DIVISOR, SENDER_ORDERS, STOP_RULES, TokenHarMoEny, choose_moves
from tests.strategies import batches, even_load, examples

Batch = tuple[IntArray, Placement]
small_batches = batches(max_world_size=6, max_experts=8, max_tokens=40)
small_thresholds = st.integers(1, 60)
orders = st.sampled_from(SENDER_ORDERS)
stop_rules = st.sampled_from(STOP_RULES)


def reference_tokens(counts: IntArray, placement: Placement, threshold: int, stop_rule: str) -> IntArray:
    """Redistribute as the paper says it, as slowly and plainly as possible; ties go to the lowest index."""
    num_ranks, num_experts = counts.shape
    home, resident = placement.home, placement.resident
    ranks, experts = range(num_ranks), range(num_experts)
    tokens = [[[int(counts[s, e]) * (d == home[e]) for d in ranks] for e in experts] for s in ranks]
    average = even_load(int(counts.sum()), num_ranks)
    while True:
        load = [sum(tokens[s][e][d] for s in ranks for e in experts) for d in ranks]
        over, under = load.index(max(load)), load.index(min(load))
        popularity = [sum(tokens[s][e][over] for s in ranks) for e in experts]
        expert = popularity.index(max(popularity))
        if load[over] <= average:
            return np.array(tokens)
        if average - load[under] < threshold or popularity[expert] < threshold:
            fetched = [e for e in experts if not resident[e, under] and any(tokens[s][e][under] for s in ranks)]
            its_fetches_end = threshold * (len(fetched) + 1)
            amount = min(load[over] - average, average - load[under], popularity[expert])
            free = resident[expert, under] or (its_fetches_end <= load[under] and amount >= average / MIN_MOVE_DIVISOR)
            if stop_rule == "paper" or not free:
                return np.array(tokens)
        while load[over] > average and load[under] < average and any(tokens[s][expert][over] for s in ranks):
            sender = max(ranks, key=lambda s: tokens[s][expert][over])
            amount = min(load[over] - average, average - load[under], tokens[sender][expert][over])
            tokens[sender][expert][over] -= amount
            tokens[sender][expert][under] += amount
            load[over] -= amount
            load[under] += amount


def num_travelling(plan: Plan) -> int:
    return int(plan.tokens.sum() - sum(plan.tokens[rank, :, rank].sum() for rank in range(plan.world_size)))


def home_load(batch: Batch) -> IntArray:
    counts, placement = batch
    return np.bincount(placement.home, counts.sum(axis=0), placement.world_size).astype(np.int64)


@examples(250)
@given(batch=small_batches, threshold=small_thresholds, stop_rule=stop_rules)
def test_same_plan_as_the_algorithm(batch: Batch, threshold: int, stop_rule: str) -> None:
    counts, placement = batch
    expected = reference_tokens(counts, placement, threshold, stop_rule)
    paper = TokenHarMoEny(threshold=threshold, stop_rule=stop_rule, sender_order="largest_first").plan(
        counts, placement
    )
    np.testing.assert_array_equal(paper.tokens, expected)
    ours = TokenHarMoEny(threshold=threshold, stop_rule=stop_rule).plan(counts, placement)
    np.testing.assert_array_equal(ours.executed(), expected.sum(axis=0))
    np.testing.assert_array_equal(ours.fetch, paper.fetch)


def test_a_plan_by_hand() -> None:
    # Rank 0 holds experts 0 and 1 and has 14 of 16 tokens; 6 of the more popular expert 1 go to rank 1. The paper takes
    # them from rank 0, the largest sender; taking rank 1's own 4 first makes all 4 and 4 of rank 0's stay at home.
    counts = np.array([[1, 6, 1], [3, 4, 1]])
    placement = Placement.from_home(np.array([0, 0, 1]), 2)
    paper = TokenHarMoEny(threshold=4, sender_order="largest_first").plan(counts, placement)
    assert paper.tokens[:, 1].tolist() == [[0, 6], [4, 0]]
    ours = TokenHarMoEny(threshold=4).plan(counts, placement)
    assert ours.tokens[:, 1].tolist() == [[4, 2], [0, 4]]
    assert paper.fetch.tolist() == ours.fetch.tolist() == [[False, False], [False, True], [False, False]]
    assert paper.load().tolist() == ours.load().tolist() == [8, 8]
    assert TokenHarMoEny(threshold=7).plan(counts, placement).load().tolist() == [14, 2]


@examples(300)
@given(batch=batches(), order=orders, stop_rule=stop_rules)
def test_threshold_one_reaches_the_lower_bound(batch: Batch, order: str, stop_rule: str) -> None:
    counts, placement = batch
    plan = TokenHarMoEny(threshold=1, stop_rule=stop_rule, sender_order=order).plan(counts, placement)
    assert plan.load().max() == even_load(int(counts.sum()), plan.world_size)


@examples(300)
@given(batch=batches(), threshold=st.integers(1, 10_000), stop_rule=stop_rules)
def test_imbalance_that_the_stop_rules_leave(batch: Batch, threshold: int, stop_rule: str) -> None:
    counts, placement = batch
    plan = TokenHarMoEny(threshold=threshold, stop_rule=stop_rule).plan(counts, placement)
    load, average = plan.load(), even_load(int(counts.sum()), plan.world_size)
    over = int(load.argmax())
    least_room, most_popular = average - load.min(), plan.executed()[:, over].max()
    assert load[over] <= average or least_room < threshold or most_popular < threshold

    # Whichever rule stopped it, the largest load has a limit: all others are nearly full, or all its experts are small.
    nearly_full = average + (plan.world_size - 1) * (threshold - 1)
    small_experts = np.count_nonzero(placement.home == over) * (threshold - 1)
    assert load[over] <= max(average, nearly_full, small_experts)


@examples(300)
@given(batch=batches(), threshold=st.integers(1, 10_000), stop_rule=stop_rules)
def test_nobody_crosses_the_average(batch: Batch, threshold: int, stop_rule: str) -> None:
    counts, placement = batch
    plan = TokenHarMoEny(threshold=threshold, stop_rule=stop_rule).plan(counts, placement)
    before, after = home_load(batch), plan.load()
    average = even_load(int(counts.sum()), plan.world_size)
    gives = before > average
    assert (after[gives] <= before[gives]).all()
    assert (after[gives] >= average).all()
    assert (after[~gives] >= before[~gives]).all()
    assert (after[~gives] <= average).all()
    assert after.max() <= StaticEP().plan(counts, placement).load().max()


@examples(300)
@given(batch=batches(), threshold=st.integers(1, 10_000))
def test_no_more_fetches_than_the_excess_is_worth(batch: Batch, threshold: int) -> None:
    counts, placement = batch
    nothing_held_twice = Placement.from_home(placement.home, placement.world_size)
    plan = TokenHarMoEny(threshold=threshold, stop_rule="paper").plan(counts, nothing_held_twice)
    before, average = home_load(batch), even_load(int(counts.sum()), plan.world_size)
    gives = before > average
    excess = int((before - average)[gives].sum())
    num_fetches = int(plan.fetch.sum())
    assert num_fetches <= excess // threshold + gives.sum()
    assert num_fetches <= (~gives).sum() + gives[placement.home].sum()

    # A fetch that does not pay is the last of a rank that it brings down to the average.
    too_small = np.argwhere(plan.fetch & (plan.executed() < threshold))
    givers = Counter(int(placement.home[expert]) for expert, _ in too_small)
    assert all(n == 1 and plan.load()[giver] == average for giver, n in givers.items())

    # Weights that are there already are not fetched, and change nothing else.
    held = TokenHarMoEny(threshold=threshold, stop_rule="paper").plan(counts, placement)
    np.testing.assert_array_equal(held.tokens, plan.tokens)
    np.testing.assert_array_equal(held.fetch, plan.fetch & ~placement.resident)


@examples(300)
@given(batch=batches(), threshold=st.integers(1, 10_000))
def test_covered_does_what_the_paper_does_and_then_more(batch: Batch, threshold: int) -> None:
    counts, placement = batch
    home, held = placement.home, placement.resident
    paper = choose_moves(counts, home, held, threshold, False)
    covered = choose_moves(counts, home, held, threshold, True)
    np.testing.assert_array_equal(covered[: len(paper)], paper)
    load = TokenHarMoEny(threshold=threshold).plan(counts, placement).load()
    assert load.max() <= TokenHarMoEny(threshold=threshold, stop_rule="paper").plan(counts, placement).load().max()


@examples(300)
@given(batch=batches(), hidden_share=st.floats(0.01, 1.0))
def test_what_covered_moves_add_nobody_waits_for(batch: Batch, hidden_share: float) -> None:
    counts, placement = batch
    average = even_load(int(counts.sum()), placement.world_size)
    # So large that the paper moves nothing: all moves are covered ones.
    largest_room = int((average - home_load(batch)).max())
    threshold = max(1, largest_room + 1, round(average * hidden_share))
    paper = TokenHarMoEny(threshold=threshold, stop_rule="paper").plan(counts, placement)
    assert not paper.fetch.any()
    plan = TokenHarMoEny(threshold=threshold).plan(counts, placement)
    assert plan.fetch.sum(axis=0).max() <= average // threshold

    # Every rank works through what it holds while the fetches arrive one by one, each `threshold` tokens' time after
    # the one before, and executes them in the order of the moves.
    moves = choose_moves(counts, placement.home, placement.resident, threshold, True)
    for rank in range(placement.world_size):
        fetched = [int(expert) for expert, receiver, _ in moves if receiver == rank and plan.fetch[expert, rank]]
        executed = plan.executed()[:, rank]
        clock = int(executed.sum() - executed[fetched].sum())
        for i, expert in enumerate(fetched):
            clock = max(clock, threshold * (i + 1)) + int(executed[expert])
        assert clock == plan.load()[rank]


def test_weights_that_are_there_need_no_threshold() -> None:
    counts = np.array([[10, 0], [0, 4]])
    home = np.array([0, 1])
    everywhere = Placement(home=home, resident=np.ones((2, 2), dtype=np.bool_))
    assert TokenHarMoEny(threshold=100).plan(counts, everywhere).load().tolist() == [7, 7]
    assert TokenHarMoEny(threshold=100).plan(counts, Placement.from_home(home, 2)).load().tolist() == [10, 4]
    assert TokenHarMoEny(threshold=100, stop_rule="paper").plan(counts, everywhere).load().tolist() == [10, 4]
    # 3 tokens are less than a fetch is worth, but 4 others take as long as the fetch.
    assert TokenHarMoEny(threshold=4).plan(counts, Placement.from_home(home, 2)).load().tolist() == [7, 7]
    assert TokenHarMoEny(threshold=5).plan(counts, Placement.from_home(home, 2)).load().tolist() == [10, 4]


@examples(60)
@given(batch=batches(max_world_size=5, max_experts=4, max_tokens=30), threshold=st.integers(1, 20))
@example(batch=(np.array([[9], [0], [0], [4], [0]]), place("contiguous", 1, 5)), threshold=1)
def test_local_first_moves_as_little_as_any_plan_with_these_loads(batch: Batch, threshold: int) -> None:
    counts, placement = batch
    plan = TokenHarMoEny(threshold=threshold).plan(counts, placement)
    world_size = plan.world_size
    # The transport problem over [src, expert, dst]: what is sent and what is executed, per expert, is fixed.
    cells = np.arange(plan.tokens.size).reshape(plan.tokens.shape)
    rows = [*cells.reshape(-1, world_size), *cells.transpose(1, 2, 0).reshape(-1, world_size)]
    totals = np.zeros((len(rows), plan.tokens.size))
    for i, row in enumerate(rows):
        totals[i, row] = 1
    travels = np.broadcast_to(~np.eye(world_size, dtype=np.bool_)[:, None, :], plan.tokens.shape)
    amounts = np.concatenate([counts.reshape(-1), plan.executed().reshape(-1)])
    best = linprog(travels.reshape(-1).astype(float), A_eq=totals, b_eq=amounts)
    assert best.fun is not None
    assert num_travelling(plan) == round(best.fun)


@examples(300)
@given(batch=batches(), threshold=st.integers(1, 2_000))
def test_local_first_gives_the_papers_loads_with_no_more_traffic(batch: Batch, threshold: int) -> None:
    counts, placement = batch
    ours = TokenHarMoEny(threshold=threshold).plan(counts, placement)
    paper = TokenHarMoEny(threshold=threshold, sender_order="largest_first").plan(counts, placement)
    np.testing.assert_array_equal(ours.executed(), paper.executed())
    assert num_travelling(ours) <= num_travelling(paper)


def test_threshold_is_calibrated_unless_it_is_set() -> None:
    cost = ExpertCost(token_s=2e-6, fetch_s=1e-3)
    assert TokenHarMoEny().calibrated(cost).threshold == 500
    assert TokenHarMoEny(threshold=7).calibrated(cost).threshold == 7
    calibrated = TokenHarMoEny(sender_order="largest_first", placement="round_robin").calibrated(cost)
    assert calibrated == TokenHarMoEny(threshold=500, sender_order="largest_first", placement="round_robin")


def test_planning_needs_a_threshold() -> None:
    with pytest.raises(ValueError, match="threshold: null, must be calibrated"):
        TokenHarMoEny().plan(np.ones((2, 2), dtype=np.int64), place("contiguous", 2, 2))


@pytest.mark.parametrize("threshold", [0, -5])
def test_threshold_below_one(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold: {threshold}, must be at least 1"):
        TokenHarMoEny(threshold=threshold).validate()


def test_unknown_stop_rule() -> None:
    with pytest.raises(ValueError, match="stop_rule: 'never', must be one of covered, paper"):
        TokenHarMoEny(stop_rule="never").validate()


def test_unknown_sender_order() -> None:
    with pytest.raises(ValueError, match="sender_order: 'random', must be one of local_first, largest_first"):
        TokenHarMoEny(sender_order="random").validate()
