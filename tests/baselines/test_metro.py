from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baselines.eplb import EPLB
from baselines.metro import METRO, choose_replicas
from harmoeny.placement import IntArray, Placement
from tests.strategies import batches, examples


@examples(200)
@given(data=st.data())
def test_the_most_activated_experts_on_a_rank_are_the_fewest_possible(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 4))
    load = np.array(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)), dtype=np.int64)
    resident = np.array(
        [data.draw(st.lists(st.booleans(), min_size=world_size, max_size=world_size).filter(any)) for _ in load]
    )
    chosen = choose_replicas(load, resident.argmax(axis=1), resident)
    assert resident[np.arange(len(load)), chosen].all()
    active = np.flatnonzero(load)
    choices = product(*(np.flatnonzero(resident[e]) for e in active))
    best = min(np.bincount(np.array(c, dtype=np.int64), minlength=world_size).max() for c in choices)
    assert np.bincount(chosen[active], minlength=world_size).max() == best


def test_a_chain_of_moves_is_found() -> None:
    """Greed puts three experts on rank 0; only moving two of them on, one to rank 1 and its expert to rank 2, helps."""
    resident = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]], dtype=np.bool_)
    chosen = choose_replicas(np.ones(6, dtype=np.int64), resident.argmax(axis=1), resident)
    assert np.bincount(chosen).tolist() == [2, 2, 2]


@examples(150)
@given(batch=batches())
def test_an_expert_is_executed_on_one_rank_that_holds_it(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = METRO().plan(counts, placement)
    plan.validate(counts, placement)
    assert not plan.fetch.any()
    assert ((plan.executed() > 0).sum(axis=1) <= 1).all()
    activated = [(METRO().plan(counts, placement), EPLB().plan(counts, placement))]
    for one, even in activated:
        assert (one.executed() > 0).sum(axis=0).max() <= (even.executed() > 0).sum(axis=0).max()


def test_splitting_by_tokens_makes_decode_worse() -> None:
    """With few tokens, EPLB's even shares read an expert on every rank that has it; METRO reads it once."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(64, np.full(128, 1 / 128), size=8).astype(np.int64)
    placement = METRO(redundant_experts_per_rank=8).place(0, 128, 8)
    shared = (EPLB().plan(counts, placement).executed() > 0).sum(axis=0).max()
    assert (METRO().plan(counts, placement).executed() > 0).sum(axis=0).max() < shared
