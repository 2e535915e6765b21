from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.cost import ExpertCost
from harmoeny.runtime.memory.schedule import (
    EMPTY,
    ExpertSlice,
    Schedule,
    home_slots,
    make_schedule,
    num_slots_needed,
    replace_residents,
    with_slot,
)
from tests.strategies import examples

COST = ExpertCost(token_s=1.0, fetch_s=10.0)


def work(**tokens: int) -> list[ExpertSlice]:
    """Slices by expert, ``e3=7``: seven tokens for expert 3."""
    return [ExpertSlice(int(name[1:]), 0, n) for name, n in tokens.items()]


def order(schedule: Schedule) -> list[int]:
    return [step.part.expert_id for step in schedule.slices]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[ExpertSlice], list[int], ExpertCost, str]:
    num_experts = draw(st.integers(1, 12))
    num_slots = draw(st.integers(1, num_experts))
    held = draw(st.permutations(range(num_experts)))[: draw(st.integers(0, num_slots))]
    home = list(draw(st.permutations([*held, *[EMPTY] * (num_slots - len(held))])))
    slices = draw(st.lists(st.tuples(st.integers(0, num_experts - 1), st.integers(1, 50)), max_size=20))
    items = [ExpertSlice(e, start, n) for start, (e, n) in enumerate(slices)]
    cost = ExpertCost(draw(st.floats(1e-6, 1.0)), draw(st.floats(0.0, 10.0)))
    return items, home, cost, draw(st.sampled_from(["covered", "paper"]))


@examples(500)
@given(layers())
def test_every_slice_runs_once_with_its_own_weights_and_slots_are_restored(
    case: tuple[list[ExpertSlice], list[int], ExpertCost, str],
) -> None:
    items, home, cost, work_order = case
    schedule = make_schedule(items, home, cost, work_order=work_order)

    assert Counter(s.part for s in schedule.slices) == Counter(items)
    content = list(home)
    last_use = [-1] * len(home)
    for index, step in enumerate(schedule.slices):
        if step.fetch:
            assert content[step.slot] != step.part.expert_id, "fetched although it is there"
            assert step.after == last_use[step.slot], "a fetch may begin when the slot's last user is done, no earlier"
            content[step.slot] = step.part.expert_id
        assert content[step.slot] == step.part.expert_id
        last_use[step.slot] = index
    for expert, slot in schedule.restores:
        assert content[slot] != expert
        content[slot] = expert
    assert [c for c, h in zip(content, home, strict=True) if h != EMPTY] == [h for h in home if h != EMPTY]


@examples(200)
@given(layers())
def test_residents_are_never_fetched_and_few_are_overwritten(
    case: tuple[list[ExpertSlice], list[int], ExpertCost, str],
) -> None:
    items, home, cost, work_order = case
    schedule = make_schedule(items, home, cost, work_order=work_order)
    fetched = [s.part.expert_id for s in schedule.slices if s.fetch]
    assert not set(fetched) & set(home)
    assert len(schedule.restores) <= min(len(fetched), 2), "two slots in turn are enough for any number of fetches"


def test_the_papers_order_and_its_slots_two_steps_before() -> None:
    items = work(e0=100, e1=90, e2=80, e3=70, e10=60, e11=50, e12=40)
    schedule = make_schedule(items, [0, 1, 2, 3], COST, work_order="paper")
    assert order(schedule) == [0, 1, 10, 11, 12, 2, 3]
    assert [(s.slot, s.after) for s in schedule.slices if s.fetch] == [(0, 0), (1, 1), (0, 2)]
    assert schedule.restores == ((0, 0), (1, 1))


def test_small_residents_are_executed_until_the_fetched_expert_is_there() -> None:
    items = work(e0=4, e1=4, e2=4, e3=4, e10=60)
    # The fetch begins after the first slice at 4 s and ends at 14 s: three more residents fill that time.
    assert order(make_schedule(items, [0, 1, 2, 3], COST)) == [0, 1, 2, 3, 10]
    assert order(make_schedule(items, [0, 1, 2, 3], COST, work_order="paper")) == [0, 1, 10, 2, 3]


def test_a_slot_without_work_is_fetched_into_at_once() -> None:
    schedule = make_schedule(work(e0=30, e10=60), [0, 1], COST)
    (fetch,) = [s for s in schedule.slices if s.fetch]
    assert (fetch.slot, fetch.after) == (1, -1)
    spare = make_schedule(work(e0=30, e1=5, e10=60), [0, 1, EMPTY], COST)
    assert [(s.slot, s.after) for s in spare.slices if s.fetch] == [(2, -1)]
    assert spare.restores == (), "an empty slot holds nobody who would have to come back"


def test_an_expert_is_fetched_twice_where_one_slot_is_all_there_is() -> None:
    items = [ExpertSlice(5, 0, 9), ExpertSlice(6, 9, 8), ExpertSlice(5, 17, 7)]
    schedule = make_schedule(items, [EMPTY], COST)
    assert [(s.part.expert_id, s.fetch) for s in schedule.slices] == [(5, True), (6, True), (5, True)]


@pytest.mark.parametrize("work_order", ["covered", "paper"])
def test_nothing_to_do(work_order: str) -> None:
    assert make_schedule([], [0, 1], COST, work_order=work_order) == Schedule((), ())


@examples(200)
@given(layers())
def test_residents_and_fetched_experts_keep_their_order_if_asked(
    case: tuple[list[ExpertSlice], list[int], ExpertCost, str],
) -> None:
    items, home, cost, work_order = case
    steps = make_schedule(items, home, cost, work_order=work_order, keep_order=True).slices
    for kind in (True, False):
        assert [s.part for s in steps if (s.part.expert_id in home) == kind] == [
            w for w in items if (w.expert_id in home) == kind
        ]


@examples(200)
@given(
    st.lists(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=5, max_size=5), min_size=2, max_size=2),
    st.none() | st.integers(1, 7),
)
def test_what_all_ranks_hold_is_what_their_slots_hold(residents: list[list[list[bool]]], num_slots: int | None) -> None:
    before, after = (np.array(r) for r in residents)
    rooms = num_slots_needed(before.sum(axis=0), len(before), num_slots)
    for rank, room in enumerate(rooms.tolist()):
        home = home_slots(before[:, rank], num_slots)
        assert len(home) == room
        assert sorted(e for e in home if e != EMPTY) == np.flatnonzero(with_slot(before, rooms)[:, rank]).tolist()
        new = with_slot(after, rooms)[:, rank] & ~with_slot(before, rooms)[:, rank]
        changed = replace_residents(home, after[:, rank])
        assert sorted(e for e in home if e != EMPTY) == np.flatnonzero(with_slot(after, rooms)[:, rank]).tolist()
        assert sorted(home[slot] for slot in changed) == np.flatnonzero(new).tolist()
