from __future__ import annotations

import pytest

from experiments.simulator.replay import CopyEngine, Replayed, Sources, replay
from harmoeny.cost import ExpertCost
from harmoeny.runtime.memory.schedule import ExpertWork, make_schedule

#: One token takes 1 s, one load 4 s.
COST = ExpertCost(token_s=1.0, fetch_s=4.0)


def run(
    work: dict[int, int],
    home: list[int],
    copies: CopyEngine,
    *,
    ahead: bool = True,
    order: str = "paper",
    load_share: float = 0.0,
) -> Replayed:
    schedule = make_schedule([ExpertWork(e, 0, n) for e, n in work.items()], home, COST, work_order=order)
    return replay(
        schedule,
        copies,
        Sources(host_s=4.0, load_share=load_share),
        lambda item: float(item.num_tokens),
        ahead=ahead,
        planned_s=0.0,
        start_s=1.0,
        slot_ready_s={},
    )


def test_residents_alone_take_their_computation() -> None:
    done = run({0: 3, 1: 5}, [0, 1], CopyEngine())
    assert done == Replayed(end_s=9.0)


def test_a_fetch_hides_behind_residents_and_a_restore_behind_what_follows() -> None:
    # Slot 1's resident has no tokens, so expert 7 is loaded from 0 to 4 while expert 0 runs from 1 to 4.
    copies = CopyEngine()
    done = run({0: 3, 7: 2}, [0, 1], copies)
    assert done == Replayed(end_s=6.0, fetch_s=4.0, restore_s=4.0, num_host_fetches=1, num_restores=1)
    assert copies.drain() == 10.0  # the restore of expert 1 begins when the layer's computation ends


def test_a_fetch_that_comes_late_is_waited_for() -> None:
    # Expert 0 runs from 1 to 2; expert 7 arrives at 4.
    done = run({0: 1, 7: 2}, [0, 1], CopyEngine())
    assert done == Replayed(end_s=6.0, fetch_wait_s=2.0, fetch_s=4.0, restore_s=4.0, num_host_fetches=1, num_restores=1)


def test_a_copying_processor_computes_later_unless_it_would_have_waited_anyway() -> None:
    # Half of the fetch's 4 s are taken from expert 0; what follows the layer waits for half of the restore.
    done = run({0: 3, 7: 2}, [0, 1], CopyEngine(), load_share=0.5)
    assert (done.end_s, done.fetch_wait_s, done.restoring_s) == (1 + 3 + 2 + 2, 0.0, 2.0)
    # With nothing to compute until 4, copying takes nothing from the computation.
    done = run({7: 2}, [0, 1], CopyEngine(), load_share=0.5)
    assert (done.end_s, done.fetch_wait_s) == (4 + 2, 3.0)
    # Blocking fetches are waited for in full.
    assert run({0: 3, 7: 2}, [0, 1], CopyEngine(), load_share=0.5, ahead=False).end_s == 1 + 3 + 4 + 2 + 4


def test_two_fetches_with_one_slot_are_a_chain() -> None:
    # Resident 0 runs 1-3, its slot takes 7 from 3 to 7, 7 runs 7-9, the slot takes 8 from 9 to 13, 8 runs 13-14.
    done = run({0: 2, 7: 2, 8: 1}, [0], CopyEngine())
    assert done == Replayed(
        end_s=14.0, fetch_wait_s=8.0, fetch_s=8.0, restore_s=4.0, num_host_fetches=2, num_restores=1
    )


def test_blocking_fetches_and_restores_add_up() -> None:
    done = run({0: 3, 7: 2}, [0, 1], CopyEngine(), ahead=False)
    assert done == Replayed(
        end_s=1 + 3 + 4 + 2 + 4,
        fetch_wait_s=4.0,
        restore_wait_s=4.0,
        fetch_s=4.0,
        restore_s=4.0,
        num_host_fetches=1,
        num_restores=1,
    )


def test_a_fetch_overtakes_restores_but_not_a_load_that_runs() -> None:
    copies = CopyEngine()
    copies.restore_later(0.0, 4.0)
    copies.restore_later(0.0, 4.0)
    assert copies.load(1.0, 2.0) == (4.0, 6.0)
    assert copies.drain() == 10.0


def test_weights_from_a_peer_do_not_use_the_host_link() -> None:
    schedule = make_schedule([ExpertWork(0, 0, 1), ExpertWork(7, 0, 2)], [0, 1], COST)
    copies = CopyEngine()
    done = replay(
        schedule,
        copies,
        Sources(host_s=100.0, arrivals_s={7: 3.5}),
        lambda item: float(item.num_tokens),
        ahead=True,
        planned_s=0.5,
        start_s=1.0,
        slot_ready_s={},
    )
    assert (done.end_s, done.fetch_wait_s, done.fetch_s) == pytest.approx((5.5, 1.5, 3.0))
    assert (done.num_host_fetches, done.num_peer_fetches) == (0, 1)
    assert copies.free_s == 0.0


def test_a_resident_that_is_being_replaced_is_waited_for() -> None:
    schedule = make_schedule([ExpertWork(0, 0, 1)], [0], COST)
    done = replay(
        schedule,
        CopyEngine(),
        Sources(host_s=4.0),
        lambda item: float(item.num_tokens),
        ahead=True,
        planned_s=0.0,
        start_s=1.0,
        slot_ready_s={0: 3.0},
    )
    assert done == Replayed(end_s=4.0, fetch_wait_s=2.0)
