from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.runtime.exchange.gather import add_rows, weighted_sum
from harmoeny.runtime.exchange.order import Sent
from tests.strategies import examples


@examples(200)
@given(
    num_tokens=st.integers(0, 6), top_k=st.integers(1, 3), dropped=st.booleans(), num_parts=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_some_rows_are_added_later(num_tokens: int, top_k: int, dropped: bool, num_parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assignment = rng.permutation(num_tokens * top_k)
    assignment = assignment[: rng.integers(0, len(assignment) + 1)] if dropped else assignment
    bounds = np.sort(rng.integers(0, len(assignment) + 1, 2 * num_parts)).tolist()
    later = [slice(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=True)]
    is_later = np.isin(np.arange(len(assignment)), [row for part in later for row in range(part.start, part.stop)])
    rows, weights = rng.standard_normal((len(assignment), 4)), rng.random((num_tokens, top_k))
    first, wanted = np.zeros((num_tokens, 4)), np.zeros((num_tokens, 4))
    for number, a in enumerate(assignment):
        value = weights.reshape(-1)[a] * rows[number]
        wanted[a // top_k] += value
        first[a // top_k] += 0 if is_later[number] else value
    sent, results = Sent(torch.from_numpy(assignment)), torch.from_numpy(rows)
    not_there_yet = torch.where(torch.from_numpy(is_later)[:, None], torch.nan, results)
    found = weighted_sum(not_there_yet, torch.from_numpy(weights), sent, later)
    np.testing.assert_allclose(found.numpy(), first)
    if later:
        found = add_rows(results, torch.from_numpy(weights), sent, found, later)
    np.testing.assert_allclose(found.numpy(), wanted)
