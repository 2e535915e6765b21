from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

from analysis.data.load import Run
from analysis.data.summary import best_baseline
from baselines.ideal import Ideal
from harmoeny.placement import IntArray
from tests.strategies import counts_arrays, even_load, examples


@examples(200)
@given(counts=counts_arrays())
def test_even_load_without_fetches_and_with_the_fewest_tokens_sent(counts: IntArray) -> None:
    policy = Ideal()
    policy.validate()
    plan = policy.plan(counts, policy.place(0, counts.shape[1], counts.shape[0]))
    load, own = plan.load(), counts.sum(axis=1)
    assert np.ptp(load) <= 1
    assert load.max() == even_load(int(own.sum()), len(counts))
    assert not plan.fetch.any()
    # Whatever the plan, a rank sends what it has above its load; the ranks with most keep one more where it is uneven.
    base, extra = divmod(int(own.sum()), len(counts))
    kept = np.minimum(np.sort(own)[::-1], base + (np.arange(len(counts)) < extra)).sum()
    stays = plan.tokens[np.arange(len(counts)), :, np.arange(len(counts))].sum()
    assert stays == kept


def test_nothing_is_sent_where_ranks_have_equally_much() -> None:
    counts = np.random.default_rng(0).multinomial(1000, [0.9, 0.05, 0.03, 0.02], size=4).astype(np.int64)
    plan = Ideal().plan(counts, Ideal().place(0, 4, 4))
    np.testing.assert_array_equal(plan.executed(), counts.T)


def test_the_bound_moves_no_weights() -> None:
    with pytest.raises(ValueError, match="fetch: 'async', must be none"):
        Ideal(fetch="async").validate()


def test_a_bound_is_never_the_best_baseline() -> None:
    kinds = {
        "harmoeny": {"exact": True, "baseline": False, "bound": False},
        "static_ep": {"exact": True, "baseline": True, "bound": False},
        "drop": {"exact": False, "baseline": True, "bound": False},
        "ideal": {"exact": Ideal.exact, "baseline": Ideal.baseline, "bound": Ideal.bound},
    }
    run = Run(Path(), {"systems": kinds}, {}, pd.DataFrame(), pd.DataFrame())
    speed = {"harmoeny": 9.0, "static_ep": 5.0, "drop": 11.0, "ideal": 10.0}
    systems = {name: {"throughput_tokens_per_s": {"median": value}} for name, value in speed.items()}
    assert best_baseline(run, systems) == "static_ep"
    assert best_baseline(run, {"ideal": systems["ideal"]}) is None
