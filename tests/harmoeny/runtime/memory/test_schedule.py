from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray, with_slot
from harmoeny.runtime.memory.residents import (
    EMPTY,
    SlotsOfAll,
    home_slots,
    num_slots_needed,
    replace_residents,
    settled,
)
from harmoeny.runtime.memory.schedule import make_schedule
from harmoeny.runtime.memory.waves import Schedule
from tests.strategies import examples

COST = ExpertCost(token_s=1.0, fetch_s=10.0)


def work(**tokens: int) -> IntArray:
    """One stage, by expert: ``e3=7`` is seven tokens for expert 3."""
    executed = np.zeros((1, 13), np.int64)
    for name, num_tokens in tokens.items():
        executed[0, int(name[1:])] = num_tokens
    return executed


def waves(schedule: Schedule) -> list[list[int]]:
    """The experts of every wave."""
    return [list(wave.expert_ids) for wave in schedule.waves()]


@dataclass(frozen=True)
class Case:
    executed: IntArray
    home: list[int]
    cost: ExpertCost
    work_order: str
    grouped: bool
    arrivals: dict[int, float]
    head_s: float
    rest_s: float

    def schedule(self) -> Schedule:
        return make_schedule(
            self.executed, self.home, self.cost, work_order=self.work_order, grouped=self.grouped,
            arrivals=self.arrivals, head_s=self.head_s, rest_s=self.rest_s,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 12))
    num_slots = draw(st.integers(1, num_experts))
    held = draw(st.permutations(range(num_experts)))[: draw(st.integers(0, num_slots))]
    home = list(draw(st.permutations([*held, *[EMPTY] * (num_slots - len(held))])))
    counts = st.lists(st.just(0) | st.integers(1, 50), min_size=num_experts, max_size=num_experts)
    executed = np.array(draw(st.lists(counts, min_size=1, max_size=3)))
    cost = ExpertCost(
        draw(st.floats(1e-6, 1.0)), draw(st.floats(0.0, 10.0)), launch_s=draw(st.sampled_from([0.0, 5.0]))
    )
    order, grouped = draw(st.sampled_from(["covered", "paper"])), draw(st.booleans())
    arrivals = draw(st.dictionaries(st.integers(0, num_experts - 1), st.floats(0.0, 30.0)))
    return Case(executed, home, cost, order, grouped, arrivals, *draw(st.sampled_from([(0.0, 0.0), (8.0, 20.0)])))


@examples(500)
@given(cases())
def test_every_slice_runs_once_with_its_own_weights_and_slots_are_restored(case: Case) -> None:
    schedule = case.schedule()
    done = np.zeros_like(case.executed)
    content = list(case.home)
    last_use = [-1] * len(case.home)
    fetches = list(schedule.fetches)
    for wave in schedule.waves():
        while fetches and fetches[0].wave == wave.number:
            fetch = fetches.pop(0)
            assert content[fetch.slot] != fetch.expert_id, "fetched although it is there"
            assert fetch.after == last_use[fetch.slot], "it may begin when the slot's last user is done, no earlier"
            content[fetch.slot] = fetch.expert_id
        assert [content[slot] for slot in wave.slots] == list(wave.expert_ids)
        for slot in wave.slots:
            assert last_use[slot] < wave.number, "a slot holds one expert"
            last_use[slot] = wave.number
        done[wave.stage, wave.expert_ids] += wave.num_tokens
    assert (done == case.executed).all()
    assert fetches == []
    for expert, slot in schedule.restores:
        assert content[slot] != expert
        content[slot] = expert
    assert [c for c, h in zip(content, case.home, strict=True) if h != EMPTY] == [h for h in case.home if h != EMPTY]


@examples(300)
@given(cases())
def test_rows_lie_by_stage_and_then_by_expert_or_by_wave_and_slot(case: Case) -> None:
    schedule = case.schedule()
    by_row = sorted(
        (start, wave.stage, wave.number if case.grouped else 0, slot if case.grouped else expert, num_tokens)
        for wave in schedule.waves()
        for start, slot, expert, num_tokens in zip(
            wave.starts, wave.slots, wave.expert_ids, wave.num_tokens, strict=True
        )
    )
    next_row = 0
    for start, *_, num_tokens in by_row:
        assert start == next_row, "no gaps, no overlaps"
        next_row += num_tokens
    assert [place[1:4] for place in by_row] == sorted(place[1:4] for place in by_row)
    for stage, counts in enumerate(case.executed):
        order = schedule.experts_by_row(stage)
        assert sorted(order) == np.flatnonzero(counts).tolist()
        assert case.grouped or order == sorted(order)
    if case.grouped:
        for wave in schedule.waves():
            assert wave.rows.stop - wave.rows.start == sum(wave.num_tokens), "a wave's rows are one block"


@examples(200)
@given(cases())
def test_residents_are_never_fetched_and_few_are_overwritten(case: Case) -> None:
    schedule = case.schedule()
    fetched = [fetch.expert_id for fetch in schedule.fetches]
    assert not set(fetched) & set(case.home)
    # One after the other, two slots in turn are enough for any number of fetches.
    assert len(schedule.restores) <= (len(fetched) if case.grouped else min(len(fetched), 2))
    assert all(fetch.after < fetch.wave for fetch in schedule.fetches)
    assert [f.wave for f in schedule.fetches] == sorted(f.wave for f in schedule.fetches)


@examples(200)
@given(cases())
def test_residents_and_fetched_experts_come_by_stage_and_a_wave_has_one(case: Case) -> None:
    home = set(case.home)
    for kind in (True, False):
        stages = [w.stage for w in case.schedule().waves() if any((e in home) == kind for e in w.expert_ids)]
        assert stages == sorted(stages)


@examples(200)
@given(cases())
def test_no_fetched_expert_holds_up_residents_whose_rows_come_first(case: Case) -> None:
    if case.work_order == "paper" or case.grouped:
        return
    latest = 0  # stage of a fetched expert so far
    for wave in case.schedule().waves():
        if wave.expert_ids[0] in case.home:
            assert wave.stage >= latest
        else:
            latest = max(latest, wave.stage)


def test_the_papers_order_and_its_slots_two_steps_before() -> None:
    executed = work(e0=100, e1=90, e2=80, e3=70, e10=60, e11=50, e12=40)
    schedule = make_schedule(executed, [0, 1, 2, 3], COST, work_order="paper")
    assert waves(schedule) == [[0], [1], [10], [11], [12], [2], [3]]
    assert [(f.slot, f.after) for f in schedule.fetches] == [(0, 0), (1, 1), (0, 2)]
    assert schedule.restores == [(0, 0), (1, 1)]


def test_small_residents_are_executed_until_the_fetched_expert_is_there() -> None:
    executed = work(e0=4, e1=4, e2=4, e3=4, e10=60)
    # The fetch begins after the first slice at 4 s and ends at 14 s: three more residents fill that time.
    assert waves(make_schedule(executed, [0, 1, 2, 3], COST)) == [[0], [1], [2], [3], [10]]
    assert waves(make_schedule(executed, [0, 1, 2, 3], COST, work_order="paper")) == [[0], [1], [10], [2], [3]]


def test_a_slot_without_work_is_fetched_into_at_once() -> None:
    schedule = make_schedule(work(e0=30, e10=60), [0, 1], COST)
    (fetch,) = schedule.fetches
    assert (fetch.slot, fetch.after) == (1, -1)
    spare = make_schedule(work(e0=30, e1=5, e10=60), [0, 1, EMPTY], COST)
    assert [(f.slot, f.after) for f in spare.fetches] == [(2, -1)]
    assert spare.restores == [], "an empty slot holds nobody who would have to come back"


def test_an_expert_is_fetched_twice_where_one_slot_is_all_there_is() -> None:
    executed = np.zeros((3, 7), np.int64)
    executed[[0, 1, 2], [5, 6, 5]] = 9, 8, 7
    schedule = make_schedule(executed, [EMPTY], COST)
    assert waves(schedule) == [[5], [6], [5]]
    assert [f.expert_id for f in schedule.fetches] == [5, 6, 5]


def test_grouped_all_residents_are_one_wave() -> None:
    schedule = make_schedule(work(e0=4, e1=9, e2=1, e3=4), [2, 0, EMPTY, 3, 1], COST, grouped=True)
    assert waves(schedule) == [[2, 0, 3, 1]]
    assert schedule.starts == [0, 1, 5, 9]


def test_residents_are_two_waves_where_the_second_hides_a_fetch_into_a_slot_of_the_first() -> None:
    # Resident 3 ends at 4 s and its slot takes expert 10 until 14 s, while the others are one wave from 4 s to 16 s.
    executed = work(e0=4, e1=4, e2=4, e3=4, e10=60)
    schedule = make_schedule(executed, [0, 1, 2, 3], COST, grouped=True)
    assert waves(schedule) == [[3], [0, 1, 2], [10]]
    assert [(f.slot, f.wave, f.after) for f in schedule.fetches] == [(3, 2, 0)]
    # Not where another launch costs more than that hides.
    slow = replace(COST, launch_s=11.0)
    assert waves(make_schedule(executed, [0, 1, 2, 3], slow, grouped=True)) == [[0, 1, 2, 3], [10]]


def test_a_wave_waits_for_weights_for_less_than_a_launch() -> None:
    executed, home = work(e0=4, e1=4, e10=60, e11=60), [0, 1, EMPTY, EMPTY]
    cost = replace(COST, launch_s=3.0)

    def found(head_s: float, **arrivals: float) -> list[list[int]]:
        from_peers = {int(name[1:]): seconds for name, seconds in arrivals.items()}
        return waves(make_schedule(executed, home, cost, grouped=True, arrivals=from_peers, head_s=head_s))

    # The host's link brings one at 10 s and one at 20 s; residents end at 3 + 8 s, the first of them at 11 + 63 s.
    assert found(0.0) == [[0, 1], [10], [11]]
    assert found(8.0) == [[0, 1, 10], [11]], "two seconds after the rows"
    assert found(17.0) == [[0, 1, 10, 11]]
    # Weights from peers do not wait for the host's link.
    assert found(0.0, e10=2.0, e11=2.0) == [[0, 1, 10, 11]]
    assert found(0.0, e10=8.0, e11=13.0) == [[0, 1], [10, 11]], "at 11 s one is there, two seconds later the other"
    assert found(0.0, e10=8.0, e11=15.0) == [[0, 1], [10], [11]]


def test_halves_from_the_host_take_their_turns_on_its_link_and_wait_for_those_from_peers() -> None:
    executed, home = work(e0=4, e1=4, e10=60, e11=60), [0, 1, EMPTY, EMPTY]
    cost = replace(COST, launch_s=3.0)

    def found(head_s: float, halved: set[int], **arrivals: float) -> list[list[int]]:
        from_peers = {int(name[1:]): seconds for name, seconds in arrivals.items()}
        schedule = make_schedule(executed, home, cost, grouped=True, arrivals=from_peers, halved=halved, head_s=head_s)
        return waves(schedule)

    # The host's link brings halves at 5 and 10 s, and an expert behind a half at 15 s; residents end at 11 s.
    assert found(0.0, {10, 11}, e10=2.0, e11=2.0) == [[0, 1], [10, 11]]
    assert found(0.0, {10}, e10=2.0) == [[0, 1], [10], [11]]
    assert found(8.0, {10, 11}, e10=2.0, e11=2.0) == [[0, 1, 10, 11]], "two seconds after the rows"
    assert found(8.0, {10}, e10=2.0) == [[0, 1, 10], [11]]
    assert found(8.0, {10, 11}, e10=15.0, e11=15.0) == [[0, 1], [10, 11]], "as late as what peers send"
    # One by one, after 5 s of head start: a half is there when rows are, the next 5 s later.
    one_by_one = partial(
        make_schedule, work(e0=4, e1=4, e10=3, e11=2), home, COST, arrivals={10: 3.0, 11: 3.0}, head_s=5.0
    )
    assert waves(one_by_one(halved={10})) == [[10], [11], [0], [1]]
    assert waves(one_by_one(halved={10, 11})) == [[10], [0], [11], [1]]


def test_grouped_weights_from_peers_share_a_wave_behind_the_residents_whose_slots_they_need() -> None:
    executed = work(e0=4, e1=4, e2=4, e10=6, e11=6)
    schedule = make_schedule(executed, [0, 1, 2], COST, grouped=True, arrivals={10: 1.0, 11: 1.0})
    assert waves(schedule) == [[0, 1, 2], [10, 11]]
    assert [(f.slot, f.after) for f in schedule.fetches] == [(0, 0), (1, 0)]


def test_while_rows_are_on_their_way_fetched_experts_execute_those_that_are_there() -> None:
    executed, home = np.concatenate([work(e0=4, e10=4), work(e0=4, e10=4)]), [0, EMPTY]
    cost = replace(COST, launch_s=3.0)
    # The residents' first wave ends at 7 s, weights come at 10 s.
    assert waves(make_schedule(executed, home, cost, grouped=True, rest_s=12.0)) == [[0], [10], [0, 10]]
    assert waves(make_schedule(executed, home, cost, grouped=True, rest_s=8.0)) == [[0], [0], [10], [10]]


def test_one_by_one_weights_from_peers_need_no_link() -> None:
    executed = work(e0=4, e1=4, e2=4, e10=6, e11=6)
    home = [0, 1, 2, EMPTY, EMPTY]
    assert waves(make_schedule(executed, home, COST)) == [[0], [1], [2], [10], [11]]
    assert waves(make_schedule(executed, home, COST, head_s=20.0)) == [[10], [11], [0], [1], [2]]
    assert waves(make_schedule(executed, home, COST, arrivals={10: 3.0, 11: 3.0})) == [[0], [10], [11], [1], [2]]


@pytest.mark.parametrize("work_order", ["covered", "paper"])
@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_to_do(work_order: str, grouped: bool) -> None:
    schedule = make_schedule(work(), [0, 1], COST, work_order=work_order, grouped=grouped)
    assert (list(schedule.waves()), schedule.fetches, schedule.restores) == ([], (), ())


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


@examples(200)
@given(num_ranks=st.integers(1, 4), num_slots=st.none() | st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_every_rank_knows_what_the_slots_of_all_ranks_hold(num_ranks: int, num_slots: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    resident = rng.random((6, num_ranks)) < 0.4
    known = SlotsOfAll(resident, num_slots)
    homes = [home_slots(resident[:, rank], num_slots) for rank in range(num_ranks)]
    for _ in range(4):
        assert known.order is not None
        for home, order in zip(homes, known.order.tolist(), strict=True):
            held = [expert for expert in home if expert != EMPTY]
            assert order == held + [expert for expert in range(6) if expert not in held]
        resident = rng.random((6, num_ranks)) < rng.choice([0.1, 0.4, 0.9])
        known.replace(resident)
        for rank, home in enumerate(homes):
            before = list(home)
            changed = replace_residents(home, resident[:, rank])
            wanted = np.flatnonzero(resident[:, rank])[: len(home)].tolist()
            free = [slot for slot, expert in enumerate(before) if expert not in wanted]
            assert all(home[slot] == before[slot] for slot in range(len(home)) if slot not in free), "they stay"
            new = [expert for expert in wanted if expert not in before]
            assert [home[slot] for slot in free] == (new + [EMPTY] * len(free))[: len(free)]
            assert changed == free[: len(new)]
    known.lose()
    known.replace(resident)
    assert known.order is None


@examples(300)
@given(case=cases(), data=st.data())
def test_what_the_host_executes_lies_beside_the_waves_and_slots_end_as_wanted(case: Case, data: st.DataObject) -> None:
    executed = case.executed[:1]
    num_experts = executed.shape[1]
    host = np.array(data.draw(st.lists(st.booleans(), min_size=num_experts, max_size=num_experts)))
    wanted = data.draw(st.none() | st.frozensets(st.integers(0, num_experts - 1), max_size=len(case.home)))
    schedule = make_schedule(
        executed, case.home, case.cost, work_order=case.work_order, grouped=case.grouped, arrivals=case.arrivals,
        head_s=case.head_s, host_E=host, wanted=wanted,
    )  # fmt: skip
    rows = [(part.start, part.num_tokens, part.expert_id) for part in schedule.host]
    assert {e for *_, e in rows} == set(np.flatnonzero(host & (executed[0] > 0)).tolist())
    device = zip(schedule.starts, schedule.num_tokens, schedule.expert_ids, strict=True)
    in_order = sorted([*rows, *device])
    assert [e for *_, e in in_order] == schedule.experts_by_row()
    assert sum(n for _, n, _ in in_order) == executed.sum()
    next_row = 0
    for start, n, expert in in_order:
        assert (start, n) == (next_row, executed[0, expert])
        next_row += n
    if not case.grouped:
        assert schedule.experts_by_row() == sorted(schedule.experts_by_row())

    content = list(case.home)
    for fetch in schedule.fetches:
        assert not host[fetch.expert_id]
        content[fetch.slot] = fetch.expert_id
    for expert, slot in schedule.restores:
        assert content[slot] != expert
        content[slot] = expert
    if wanted is None:
        assert schedule.after is None
    else:
        assert schedule.after is not None
        assert sorted(e for e in schedule.after if e != EMPTY) == sorted(wanted)
        assert all(now in (EMPTY, then) for now, then in zip(schedule.after, content, strict=True))


@examples(200)
@given(st.lists(st.integers(EMPTY, 8), min_size=1, max_size=6), st.frozensets(st.integers(0, 8)))
def test_settling_copies_no_more_than_what_is_missing(content: list[int], wanted: frozenset[int]) -> None:
    after, copies = settled(content, wanted)
    kept = sorted(wanted)[: len(content)]
    assert sorted(e for e in after if e != EMPTY) == kept
    assert sorted(e for e, _ in copies) == sorted(set(kept) - set(content))
    assert all(after[slot] == e for e, slot in copies)
    assert all(now in (EMPTY, then) for slot, (now, then) in enumerate(zip(after, content, strict=True))
               if slot not in {s for _, s in copies})  # fmt: skip
