from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.trtllm_eplb import TRTLLMEPLB
from harmoeny.packing import copies_by_load, longest_first
from tests.strategies import examples


def test_statistics_decay_from_batch_to_batch() -> None:
    policy = TRTLLMEPLB(decay=0.5)
    history = [np.array([[8, 0], [0, 0]]), np.array([[0, 4], [0, 0]]), np.array([[1, 0], [1, 1]])]
    np.testing.assert_allclose(policy.expected_load(history), [8 / 4 + 2, 4 / 2 + 1])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.99])
def test_what_is_forgotten_weighs_less_than_a_thousandth(decay: float) -> None:
    window = TRTLLMEPLB(decay=decay).history_window
    assert decay**window <= 1e-3 * (1 + 1e-9)
    assert window == 1 or decay ** (window - 1) > 1e-3


def test_layers_take_turns() -> None:
    policy = TRTLLMEPLB(interval=3)
    due = [[layer for layer in range(6) if policy.is_due(layer, batch)] for batch in range(1, 5)]
    assert due == [[0, 3], [1, 4], [2, 5], [0, 3]]


@examples(100)
@given(load=st.lists(st.integers(0, 30), min_size=1, max_size=4), max_copies=st.integers(1, 4), data=st.data())
def test_copies_minimise_the_heaviest_share(load: list[int], max_copies: int, data: st.DataObject) -> None:
    num_copies = data.draw(st.integers(len(load), len(load) * max_copies))
    copies = copies_by_load(np.array(load, dtype=np.float64), num_copies, max_copies)
    assert copies.sum() == num_copies
    assert copies.min() >= 1
    assert copies.max() <= max_copies
    best = min(
        max(n / c for n, c in zip(load, way, strict=True))
        for way in product(range(1, max_copies + 1), repeat=len(load))
        if sum(way) == num_copies
    )
    assert (np.array(load) / copies).max() == best


@examples(150)
@given(
    num_ranks=st.integers(1, 6),
    num_experts=st.integers(1, 20),
    redundant=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_slots_are_used_and_every_expert_has_a_place(
    num_ranks: int, num_experts: int, redundant: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    load = (rng.zipf(1.5, num_experts) % 1000).astype(np.float64)
    num_slots = min(-(-num_experts // num_ranks) + redundant, num_experts)
    copies = copies_by_load(load, num_ranks * num_slots, num_ranks)
    resident, rank_load = longest_first(load, copies, num_ranks, num_slots)
    assert (resident.sum(axis=0) == num_slots).all()
    assert resident.any(axis=1).all()
    np.testing.assert_allclose(rank_load, ((load / resident.sum(axis=1))[:, None] * resident).sum(axis=0))


def test_copies_go_by_falling_share_to_the_least_loaded_rank() -> None:
    load, copies = np.array([12.0, 5.0, 4.0, 3.0]), np.array([2, 1, 1, 1])
    resident, rank_load = longest_first(load, copies, 3, 2)
    # 6 and 6 on ranks 0 and 1, then 5 on rank 2, 4 there, 3 on rank 0; the slot left on rank 1 takes expert 1.
    assert resident.tolist() == [[True, True, False], [False, True, True], [False, False, True], [True, False, False]]
    assert rank_load.tolist() == [9.0, 8.5, 6.5]


def test_a_hot_expert_gets_copies_where_it_was_seen() -> None:
    policy = TRTLLMEPLB(redundant_experts_per_rank=1)
    placement = policy.place(0, 8, 4)
    counts = np.full((4, 8), 5, dtype=np.int64)
    counts[:, 6] = 1000
    moved = policy.update_placement(0, [counts], placement)
    assert moved is not None
    moved.validate()
    assert moved.resident[6].all()
    assert policy.plan(counts, moved).imbalance() < 1.05
    assert policy.update_placement(1, [counts], placement) is None  # it is not the second layer's turn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay: 1.0, must be between 0 and 0.99"),
        ({"interval": 0}, "interval: 0, must be at least 1"),
        ({"redundant_experts_per_rank": -1}, "redundant_experts_per_rank: -1, must be at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRTLLMEPLB(**options).validate()  # type: ignore[arg-type]
