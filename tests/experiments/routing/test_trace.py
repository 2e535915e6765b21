from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import make_trace
from harmoeny.placement import IntArray
from tests.strategies import examples


def random_ids(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> IntArray:
    ids = rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k].astype(np.int64)
    ids[rng.random(ids.shape) < 0.1] = -1  # left out by the model
    return ids


def random_trace(
    seed: int, *, world_size: int, num_experts: int = 5, top_k: int = 2, token_paths: bool = True, path: str = "trace"
) -> tuple[RecordedRouting, list[list[list[IntArray]]]]:
    """Return a trace of two batches and three layers, the last with few tokens, and the token paths that it is of."""
    rng = np.random.default_rng(seed)
    ids = [[[random_ids(rng, n, num_experts, top_k) for n in (12, 12, 3)] for _ in range(2)] for _ in range(world_size)]
    return make_trace(Path(path), ids, num_experts, ("model", "text"), [0, 0, 1], token_paths=token_paths), ids


@examples(40)
@given(seed=st.integers(0, 1000), recorded=st.integers(1, 4), wanted=st.integers(1, 9), paths=st.booleans())
def test_any_number_of_ranks_shares_the_same_tokens(seed: int, recorded: int, wanted: int, paths: bool) -> None:
    trace, ids = random_trace(seed, world_size=recorded, token_paths=paths)
    for batch in range(2):
        for layer in range(3):
            everyone = np.concatenate([ids[rank][batch][layer] for rank in range(recorded)])
            tokens = trace.spread_tokens(batch, layer, wanted)
            counts = trace.spread_counts(batch, layer, wanted)
            assert tokens.sum() == len(everyone)
            assert tokens.max() - tokens.min() <= 1 or wanted == recorded
            assert counts.shape == (wanted, 5)
            assert (counts >= 0).all()
            np.testing.assert_array_equal(counts.sum(axis=0), [np.count_nonzero(everyone == e) for e in range(5)])
            if paths:
                pieces = [trace.path_of(batch, layer, rank, wanted) for rank in range(wanted)]
                np.testing.assert_array_equal(np.concatenate(pieces), everyone)
                for rank, piece in enumerate(pieces):
                    np.testing.assert_array_equal(counts[rank], [np.count_nonzero(piece == e) for e in range(5)])


@given(totals=st.lists(st.integers(0, 50), min_size=1, max_size=8), world_size=st.integers(1, 9))
def test_counts_without_ranks_are_dealt_out_one_by_one(totals: list[int], world_size: int) -> None:
    counts = np.array(totals).reshape(1, 1, 1, -1)
    trace = RecordedRouting("x", "m", "d", 1, counts.sum(axis=3), counts)
    expected = np.zeros((world_size, len(totals)), dtype=np.int64)
    assignments = [expert for expert, n in enumerate(totals) for _ in range(n)]
    for i, expert in enumerate(assignments):
        expected[i % world_size, expert] += 1
    np.testing.assert_array_equal(trace.spread_counts(0, 0, world_size), expected)
    np.testing.assert_array_equal(trace.spread_tokens(0, 0, world_size), expected.sum(axis=1))


@pytest.mark.parametrize("token_paths", [True, False])
def test_counts_are_those_of_the_paths(token_paths: bool) -> None:
    trace, ids = random_trace(1, world_size=3, token_paths=token_paths)
    assert trace.num_tokens.tolist() == [[[12] * 3, [12] * 3, [3] * 3]] * 2
    for batch, layer, rank in np.ndindex(2, 3, 3):
        found = ids[rank][batch][layer]
        assert trace.counts[batch, layer, rank].tolist() == [np.count_nonzero(found == e) for e in range(5)]
    assert bool(trace.paths) == token_paths
