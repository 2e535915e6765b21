"""Tokens that are drawn instead of read: shares by count, no special ones, as many as a run needs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets.base import Dataset
from experiments.datasets.kit.special_tokens import END_ID
from experiments.datasets.synthetic import FIRST_ID, Constant, Random, SkewedTokens, Synthetic
from experiments.text.prepare import prepare_point
from experiments.text.tokens import prepare_tokens
from tests.conftest import Load
from tests.experiments.datasets.test_datasets import VOCAB_SIZE
from tests.strategies import examples


class TestSynthetic:
    @examples()
    @given(n=st.integers(1, 2000), vocab=st.integers(FIRST_ID + 2, 300), share=st.floats(0, 1))
    def test_share_of_the_one_token_is_exact(self, n: int, vocab: int, share: float) -> None:
        ids = SkewedTokens(share=share, token=vocab - 1).ids(n, vocab)
        assert len(ids) == n
        assert np.count_nonzero(ids == vocab - 1) == round(n * share)
        assert ids.min() >= FIRST_ID
        assert ids.max() < vocab

    def test_the_others_are_alike(self) -> None:
        ids = SkewedTokens(share=0.5, token=7).ids(100_000, 53)
        counts = np.bincount(ids, minlength=53)
        others = np.delete(counts[FIRST_ID:], 7 - FIRST_ID)
        assert (abs(others - 50_000 / 49) < 200).all()
        # Spread over the whole text, so that every rank gets its share.
        assert (abs((ids.reshape(10, -1) == 7).mean(axis=1) - 0.5) < 0.03).all()
        counts = np.bincount(Random().ids(100_000, 53), minlength=53)
        assert (abs(counts[FIRST_ID:] - 2000) < 250).all()
        assert set(Constant(token=5).ids(10, 53).tolist()) == {5}

    @pytest.mark.parametrize("data", [Random(), Constant(), SkewedTokens()])
    def test_deterministic_and_without_special_tokens(self, data: Synthetic) -> None:
        tokens = prepare_tokens(data, VOCAB_SIZE, num_tokens=1000)
        ids = np.load(tokens.path)
        np.testing.assert_array_equal(ids, data.ids(1000, VOCAB_SIZE))
        assert tokens.num_tokens == 1000
        assert END_ID not in ids

    def test_bad_values(self) -> None:
        bad: list[tuple[Dataset, str]] = [
            (SkewedTokens(share=1.5), r"dataset\.share: 1\.5, must be 0 to 1"),
            (SkewedTokens(token=-1), r"dataset\.token: -1, must be at least 0"),
            (Constant(token=-1), r"dataset\.token: -1, must be at least 0"),
        ]
        for data, message in bad:
            with pytest.raises(ValueError, match=f"^{message}"):
                data.validate()
        with pytest.raises(ValueError, match=r"^dataset\.token: 600, must be below 512, the model's vocabulary"):
            prepare_tokens(Constant(token=600), VOCAB_SIZE, num_tokens=10)

    def test_a_run_gets_as_many_as_it_needs_and_no_rank_reads_anothers(self, load: Load) -> None:
        point = load("dataset=random", "model=moe_stack", "world_size=2", "batch_size=3", "seq_len=16", "rounds=4")
        tokens = prepare_point(point)
        assert tokens.num_tokens == 5 * 2 * 3 * 16, "checks and warm-up have a batch of their own"
        pieces = [
            tokens.batch(index=i, rank=r, world_size=2, batch_size=3, seq_len=16) for i in range(5) for r in range(2)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces).ravel(), np.load(tokens.path))
