from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from experiments.routing.statistics import drift, imbalance, layer_dependence, popularity
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import make_trace
from harmoeny.placement import IntArray


def of_counts(given: Sequence[Sequence[Sequence[int]]] | IntArray) -> RecordedRouting:
    """Return a trace of ``[batches, layers, experts]``."""
    counts = np.asarray(given, dtype=np.int64)[:, :, None]
    return RecordedRouting("x", "m", "d", 1, counts.sum(axis=3), counts)


def drawn(shares: np.ndarray, num_tokens: int, num_batches: int, num_layers: int = 2) -> RecordedRouting:
    rng = np.random.default_rng(0)
    return of_counts(rng.multinomial(num_tokens, shares, size=(num_batches, num_layers)))


def test_loads_are_relative_to_an_even_share() -> None:
    trace = of_counts([[[2, 6, 0, 4]], [[2, 6, 0, 4]]])
    assert popularity(trace).tolist() == [[2.0, 4 / 3, 2 / 3, 0.0]]
    assert imbalance(trace, 2).tolist() == [[8 / 6], [8 / 6]], "experts 0 and 1 against 2 and 3"
    assert imbalance(trace, 4).tolist() == [[2.0], [2.0]]
    assert imbalance(of_counts([[[0, 0]]]), 2).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="--ranks: 0, must be at least 1"):
        imbalance(trace, 0)


def test_what_is_drawn_from_the_same_shares_drifts_by_chance_alone() -> None:
    shares = np.random.default_rng(1).dirichlet(np.ones(32))
    apart, chance = drift(drawn(shares, 2000, 12, num_layers=100))
    assert len(apart) == 11
    np.testing.assert_allclose(apart, chance, rtol=0.03)


def test_experts_that_change_places_are_seen_beside_chance() -> None:
    apart, chance = drift(of_counts([[[100, 0, 0]], [[0, 100, 0]], [[100, 0, 0]]]))
    np.testing.assert_allclose(apart, [1.0, 0.0])
    assert chance[0] < 0.1


def test_one_batch_has_no_drift() -> None:
    apart, chance = drift(of_counts([[[3, 4]]]))
    assert len(apart) == len(chance) == 0


def test_layers_that_choose_alike_share_all_information_and_strangers_none() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 4, (20_000, 1)) for _ in range(2))
    renamed = (one + 1) % 4
    trace = make_trace(None, [[[one, renamed, other]]], 4, ("m", "d"), [0, 0, 0], token_paths=True)  # type: ignore[arg-type]
    found = layer_dependence(trace)
    assert found[0, 1] == pytest.approx(1.0)
    assert found[0, 2] < 0.01
    np.testing.assert_array_equal(found, found.T)


def test_without_paths_the_imbalance_of_layers_is_compared() -> None:
    peaks = [5, 9, 2, 7]
    rows = [[[p, 10 - p, 0], [10 - p, 0, p], [0, 10, 0], [2 * p, 0, 20 - 2 * p]] for p in peaks]
    found = layer_dependence(of_counts(rows))
    assert found[0, 1] == pytest.approx(1.0)
    assert found[0, 3] == pytest.approx(1.0)
    assert found[0, 2] == 0, "one that never changes goes with nobody"
