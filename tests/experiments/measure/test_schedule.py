"""Which requests a pass of the open loop computes: conserved, in order, and never more than there is room for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.measure.schedule import Pass, Schedule


def run(schedule: Schedule, arrivals: list[int]) -> list[tuple[int, Pass]]:
    """Serve requests that arrive before the pass of a number; return the passes with their numbers."""
    passes, now = [], 0
    while not schedule.done:
        if schedule.idle:
            now = max(now, arrivals[schedule.num_taken])
        passes.append((now, schedule.next(sum(time <= now for time in arrivals))))
        now += 1
    return passes


@given(
    arrivals=st.lists(st.integers(0, 40), min_size=1, max_size=25).map(sorted),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 4),
    output_tokens=st.integers(1, 5),
)
def test_every_request_gets_all_its_tokens_in_order(
    arrivals: list[int], world_size: int, batch_size: int, output_tokens: int
) -> None:
    passes = run(Schedule(len(arrivals), world_size, batch_size, output_tokens), arrivals)
    had: Counter[int] = Counter()
    first: dict[int, int] = {}
    for now, one in passes:
        assert any(one.requests), "no pass computes nothing"
        waiting = [i for i in range(len(arrivals)) if arrivals[i] <= now and i not in first]
        for rank, (requests, steps) in enumerate(zip(one.requests, one.steps, strict=True)):
            running = [i for i in first if i % world_size == rank and had[i] < output_tokens]
            assert len(requests) <= batch_size
            assert all(request % world_size == rank for request in requests)
            assert list(steps) == [had[request] for request in requests]
            if one.prefill:
                assert set(steps) <= {0}
                assert set(requests) <= set(waiting)
                assert len(running) + len(requests) <= batch_size
            else:
                assert list(requests) == running, "a pass without prompts computes all that run"
        if one.prefill:
            taken = sorted(request for requests in one.requests for request in requests)
            assert taken == waiting[: len(taken)], "first come, first served"
            first |= dict.fromkeys(taken, now)
        elif waiting:
            rank = waiting[0] % world_size
            assert len(one.requests[rank]) == batch_size, "whoever waits first is read as soon as its rank has room"
        had.update(request for requests in one.requests for request in requests)
    assert had == dict.fromkeys(range(len(arrivals)), output_tokens)


def test_a_full_rank_lets_all_wait() -> None:
    schedule = Schedule(num_requests=5, world_size=2, batch_size=1, output_tokens=2)
    passes = [one for _, one in run(schedule, [0] * 5)]
    assert [one.prefill for one in passes] == [True, False, True, False, True, False]
    assert [one.requests for one in passes[::2]] == [[[0], [1]], [[2], [3]], [[4], []]]
    assert passes[1].steps == [[1], [1]]


@pytest.mark.parametrize("waiting", [1, 3, 8, 20])
def test_without_further_tokens_it_is_a_queue_served_in_batches(waiting: int) -> None:
    one = Schedule(num_requests=30, world_size=2, batch_size=4, output_tokens=1).next(waiting)
    assert sorted(request for requests in one.requests for request in requests) == list(range(min(waiting, 8)))
