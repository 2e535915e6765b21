from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.routers.base import Router, RoutingRequest, exact_counts
from experiments.routers.drawn import DrawnRouter
from experiments.routers.dynamic import DynamicRouter
from experiments.routers.model import ModelRouter
from experiments.routers.paper_skew import PaperSkewRouter
from experiments.routers.skew import SkewRouter
from experiments.routers.uniform import UniformRouter
from experiments.routers.zipf import ZipfRouter
from harmoeny.placement import IntArray
from tests.strategies import examples


def request(num_tokens: int, num_experts: int, top_k: int, **others: int) -> RoutingRequest:
    return RoutingRequest(
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        **{"batch": 0, "layer": 0, "rank": 0, "seed": 0, "world_size": 1} | others,
    )


@st.composite
def requests(draw: st.DrawFn) -> RoutingRequest:
    num_experts = draw(st.integers(1, 64), label="num_experts")
    top_k = draw(st.integers(1, min(8, num_experts)), label="top_k")
    others = {name: draw(st.integers(0, 1000), label=name) for name in ("batch", "layer", "rank", "seed")}
    return request(draw(st.integers(0, 300), label="num_tokens"), num_experts, top_k, **others)


@st.composite
def routers(draw: st.DrawFn, num_experts: int, top_k: int) -> Router:
    """Draw a router that routes by itself, with options that this layer allows."""
    num_hot = draw(st.integers(1, num_experts), label="num_hot")
    limit = min(1.0, num_hot / top_k)
    skew, other = sorted(draw(st.floats(0, limit), label="skew") for _ in range(2))
    paper = [PaperSkewRouter(skew=draw(st.floats(0, 1), label="paper_skew"))] if num_experts > top_k else []
    return draw(
        st.sampled_from(
            [
                *paper,
                UniformRouter(),
                SkewRouter(skew=skew, num_hot=num_hot),
                DynamicRouter(min_skew=skew, max_skew=other, num_hot=num_hot),
                ZipfRouter(exponent=draw(st.floats(0, 10), label="exponent")),
            ]
        )
    )


def counts_of(expert_ids: IntArray, num_experts: int) -> IntArray:
    return np.bincount(expert_ids.reshape(-1), minlength=num_experts)


def assert_within_one(counts: IntArray, wanted: list[float]) -> None:
    """Rounding moves an expert by less than one assignment, and the total not at all."""
    assert counts.sum() == round(sum(wanted))
    np.testing.assert_array_less(np.abs(counts - wanted), 1)


@examples(300)
@given(data=st.data(), req=requests())
def test_every_token_goes_to_top_k_different_experts(data: st.DataObject, req: RoutingRequest) -> None:
    router = data.draw(routers(req.num_experts, req.top_k))
    router.validate(req.num_experts, req.top_k)
    expert_ids = router.assign(req)
    assert expert_ids.shape == (req.num_tokens, req.top_k)
    assert expert_ids.dtype == np.int64
    assert all(len(set(row)) == req.top_k and set(row) <= set(range(req.num_experts)) for row in expert_ids.tolist())
    np.testing.assert_array_equal(router.assign(req), expert_ids)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 3), (5, 4), (2, 1)])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_the_papers_skew_gives_no_expert_a_token_twice(num_experts: int, top_k: int, skew: float) -> None:
    for seed in range(60):  # a quarter to a half of the draws of the first two exceed what an expert can take
        ids = PaperSkewRouter(skew=skew).assign(request(40, num_experts, top_k, seed=seed))
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert counts_of(ids, num_experts).sum() == 40 * top_k


@examples()
@given(data=st.data(), req=requests())
def test_skew_is_the_share_of_the_hot_experts(data: st.DataObject, req: RoutingRequest) -> None:
    num_hot = data.draw(st.integers(1, req.num_experts), label="num_hot")
    skew = data.draw(st.floats(0, min(1.0, num_hot / req.top_k)), label="skew")
    counts = counts_of(SkewRouter(skew=skew, num_hot=num_hot).assign(req), req.num_experts)
    total, num_cold = req.num_tokens * req.top_k, req.num_experts - num_hot
    # A hot expert takes its part of the skewed assignments and of the rest; with top_k it can take every token once,
    # and what it cannot take falls to the cold ones.
    hot = min(total * (skew / num_hot + (1 - skew) / req.num_experts), req.num_tokens)
    cold = (total - num_hot * hot) / num_cold if num_cold else 0.0
    assert_within_one(counts, [hot] * num_hot + [cold] * num_cold)
    assert counts[:num_hot].sum() > total * skew - num_hot


def test_skew_by_hand() -> None:
    # 100 tokens: half to experts 0 and 1, 25 each; the other half to all ten experts, 5 each.
    counts = counts_of(SkewRouter(skew=0.5, num_hot=2).assign(request(100, 10, 1)), 10)
    assert counts.tolist() == [30, 30, 5, 5, 5, 5, 5, 5, 5, 5]
    assert counts_of(SkewRouter(skew=1.0).assign(request(100, 10, 1)), 10).tolist() == [100] + [0] * 9
    assert counts_of(SkewRouter(skew=0.5).assign(request(100, 10, 2)), 10)[0] == 100  # half of all: every token once


@examples()
@given(req=requests())
def test_uniform_counts_differ_by_at_most_one(req: RoutingRequest) -> None:
    assert np.ptp(counts_of(UniformRouter().assign(req), req.num_experts)) <= 1


@examples()
@given(req=requests(), exponent=st.floats(0, 10))
def test_zipf_counts_fall_as_a_power(req: RoutingRequest, exponent: float) -> None:
    counts = counts_of(ZipfRouter(exponent=exponent).assign(req), req.num_experts)
    weights = [(e + 1) ** -exponent for e in range(req.num_experts)]
    left, wanted = float(req.num_tokens * req.top_k), []
    for e, weight in enumerate(weights):  # the popular ones first: what one cannot take falls to those after it
        wanted.append(min(left * weight / math.fsum(weights[e:]), req.num_tokens))
        left -= wanted[-1]
    assert_within_one(counts, wanted)
    assert (np.diff(counts) <= 1).all()


@examples()
@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda s: sum(s) > 1e-3),
    top_k=st.integers(1, 4),
    num_tokens=st.integers(0, 200),
)
def test_counts_of_any_shares(shares: list[float], top_k: int, num_tokens: int) -> None:
    top_k = min(top_k, len(shares))
    normal = np.array(shares) / sum(shares)
    counts = exact_counts(normal, num_tokens, top_k, np.random.default_rng(0))
    assert counts.sum() == num_tokens * top_k
    assert 0 <= counts.min() <= counts.max() <= num_tokens
    wanted = normal * num_tokens * top_k
    assert (counts > np.minimum(wanted, num_tokens) - 1 - 1e-6).all()  # nobody gets less than its share, rounded down
    if (wanted <= num_tokens).all():
        assert (counts < wanted + 1 + 1e-6).all()


def test_dynamic_draws_once_per_batch_for_all_layers_and_ranks() -> None:
    router, num_experts, num_tokens = DynamicRouter(max_skew=0.9, num_hot=2), 16, 4000
    hot_experts, skews = set(), []
    for batch in range(8):
        seen = [
            counts_of(router.assign(request(num_tokens, num_experts, 1, batch=batch, layer=layer, rank=rank)), 16)
            for layer, rank in itertools.product(range(3), range(4))
        ]
        assert np.ptp(seen, axis=0).max() <= 1
        hot = np.argsort(seen[0])[-2:]
        hot_experts.add(tuple(sorted(hot.tolist())))
        # hot share = skew + (1 - skew) * 2 / 16
        skews.append((seen[0][hot].sum() / num_tokens - 1 / 8) / (7 / 8))
    assert len(hot_experts) > 4
    assert min(skews) < 0.3 < 0.6 < max(skews)
    assert all(-0.01 < skew < 0.91 for skew in skews)
    other_seed = counts_of(router.assign(request(num_tokens, num_experts, 1, seed=1)), 16)
    assert not np.array_equal(other_seed, counts_of(router.assign(request(num_tokens, num_experts, 1)), 16))


def test_dynamic_stays_within_its_range() -> None:
    router = DynamicRouter(min_skew=0.4, max_skew=0.5)
    for batch in range(30):
        share = counts_of(router.assign(request(1000, 10, 1, batch=batch)), 10).max() / 1000
        assert 0.4 + 0.6 / 10 - 0.001 <= share <= 0.5 + 0.5 / 10 + 0.001


@pytest.mark.parametrize("router", [UniformRouter(), SkewRouter(skew=0.5), DynamicRouter(), ZipfRouter()])
def test_decisions_depend_on_the_request_alone(router: Router) -> None:
    keys = list(itertools.product((0, 1), repeat=4))
    wanted = {k: request(64, 8, 2, batch=k[0], layer=k[1], rank=k[2], seed=k[3]) for k in keys}
    forwards = {k: router.assign(wanted[k]) for k in keys}
    backwards = {k: router.assign(wanted[k]) for k in reversed(keys)}
    for key in keys:
        np.testing.assert_array_equal(forwards[key], backwards[key])
    # Batch, layer, rank and seed each make other decisions.
    assert len({forwards[k].tobytes() for k in keys}) == len(keys)


def test_no_request_draws_the_numbers_of_its_batch() -> None:
    first = request(1, 1, 1)
    assert first.generator().random() != first.batch_generator().random()


def test_drawn_experts_are_popular_as_a_power_says_in_the_order_of_the_numbers_or_of_the_seed() -> None:
    """One expert per token is drawn with its weight; layers and batches share the order, seeds do not."""
    weights = 1 / np.arange(1, 9)
    expected = weights / weights.sum()
    router, orders = DrawnRouter(shuffled=True), set()
    for others in ({"batch": 0}, {"batch": 3, "layer": 2}, {"rank": 1}, {"seed": 1}, {"seed": 2}):
        asked = request(40_000, 8, 1, **others)
        plain = np.bincount(DrawnRouter().assign(asked).ravel(), minlength=8) / 40_000
        np.testing.assert_allclose(plain, expected, atol=0.01)
        shuffled = np.bincount(router.assign(asked).ravel(), minlength=8) / 40_000
        np.testing.assert_allclose(np.sort(shuffled)[::-1], expected, atol=0.01)
        orders.add(tuple(np.argsort(-np.round(shuffled, 2), kind="stable")[:3]))
    assert len(orders) == 3


def test_hot_tokens_are_shuffled_over_the_batch() -> None:
    expert_ids = SkewRouter(skew=0.5).assign(request(4000, 8, 2))
    is_hot = (expert_ids == 0).any(axis=1)
    assert is_hot.all()  # half of the assignments at top_k=2: every token
    assert 0.45 < (expert_ids[:, 0] == 0).mean() < 0.55  # in no preferred column

    is_hot = SkewRouter(skew=0.5).assign(request(4000, 8, 1))[:, 0] == 0
    quarters = is_hot.reshape(4, -1).mean(axis=1)
    assert np.abs(quarters - is_hot.mean()).max() < 0.06  # 4 standard deviations of a share in 1000 tokens
    # Neighbours are independent: as many changes between hot and cold as chance gives, within 5 standard deviations.
    expected = 2 * 3999 * is_hot.mean() * (1 - is_hot.mean())
    assert abs(np.count_nonzero(is_hot[1:] != is_hot[:-1]) - expected) < 5 * math.sqrt(4000) / 2


@pytest.mark.parametrize(
    ("router", "top_k", "message"),
    [
        (SkewRouter(skew=-0.1), 1, r"router\.skew: -0\.1, must be 0 to 1"),
        (SkewRouter(skew=1.5), 1, r"router\.skew: 1\.5, must be 0 to 1"),
        (SkewRouter(skew=math.nan), 1, r"router\.skew: nan, must be 0 to 1"),
        (
            SkewRouter(skew=0.6, num_hot=2),
            4,
            r"router\.skew: 0\.6, must be at most 0\.5: with model\.top_k=4 .*num_hot=2",
        ),
        (SkewRouter(num_hot=0), 1, r"router\.num_hot: 0, must be 1 to model\.num_experts=8"),
        (SkewRouter(num_hot=9), 1, r"router\.num_hot: 9, must be 1 to model\.num_experts=8"),
        (DynamicRouter(num_hot=9), 1, r"router\.num_hot: 9, must be 1 to model\.num_experts=8"),
        (DynamicRouter(min_skew=-1), 1, r"router\.min_skew: -1, must be 0 to 1"),
        (DynamicRouter(max_skew=2), 1, r"router\.max_skew: 2, must be 0 to 1"),
        (DynamicRouter(max_skew=0.9), 2, r"router\.max_skew: 0\.9, must be at most 0\.5: .*top_k=2"),
        (
            DynamicRouter(min_skew=0.5, max_skew=0.2),
            1,
            r"router\.min_skew: 0\.5, must be at most router\.max_skew=0\.2",
        ),
        (ZipfRouter(exponent=-1), 1, r"router\.exponent: -1, must be 0 to 10"),
        (ZipfRouter(exponent=11), 1, r"router\.exponent: 11, must be 0 to 10"),
        (ZipfRouter(exponent=math.nan), 1, r"router\.exponent: nan, must be 0 to 10"),
    ],
)
def test_bad_options_are_refused(router: Any, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router.validate(8, top_k)


def test_the_models_own_router_is_recorded_not_asked() -> None:
    assert ModelRouter.from_model
    assert not any(cls.from_model for cls in (UniformRouter, SkewRouter, DynamicRouter, ZipfRouter))
    with pytest.raises(NotImplementedError, match="recorded from the model"):
        ModelRouter().assign(request(1, 2, 1))


def test_a_share_above_what_top_k_allows_is_said() -> None:
    # Zipf's law on 4 experts: 0.48, 0.24, 0.16, 0.12; with top-2 no expert can have half of the assignments or more.
    assert ZipfRouter(exponent=1).remark(request(100, 4, 2)) == ""
    assert ZipfRouter(exponent=2).remark(request(100, 4, 2)) == (
        "router=zipf: shares are capped at 0.5 (1 / model.top_k): a token meets an expert once; "
        "1 of 4 experts, the largest asked for 0.702 (expert 0), and the others share what is left"
    )
    assert UniformRouter().remark(request(100, 4, 4)) == "", "exactly what top-4 of 4 asks for"


@given(data=st.data(), asked=requests())
@examples(30)
def test_what_is_said_is_what_happens(data: st.DataObject, asked: RoutingRequest) -> None:
    router = ZipfRouter(exponent=data.draw(st.floats(0, 4)))
    shares, num_assignments = router.shares(asked), asked.num_tokens * asked.top_k
    as_asked = np.abs(router.count(asked) - shares * num_assignments).max(initial=0) <= 1
    if not router.remark(asked):
        assert as_asked
    elif asked.num_tokens >= 1 and (shares.max() - 1 / asked.top_k) * num_assignments > 1:
        assert not as_asked
