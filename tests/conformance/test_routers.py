"""What every router must keep, whatever it is for: checked on every one that discovery finds."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.registry import discover
from experiments.routers.base import CALIBRATION_BATCH, WARM_UP_BATCH, Router, RoutingRequest, SharesRouter
from experiments.routing.trace_files import write_trace
from tests.conformance.refusals import refusal_of
from tests.experiments.routing.test_trace import random_trace

ROUTERS: dict[str, type[Router]] = discover("router")[0]
#: Experts and choices per token; a router is asked for all that it does not refuse.
SHAPES = ((5, 2), (1, 1), (8, 1), (4, 4), (64, 8))
#: What a router cannot do without, by its name.
OPTIONS: dict[str, dict[str, Any]] = {"trace": {"path": "TRACE", "scale": True}}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(random_trace(0, world_size=2, path=str(path))[0], "run")
    return path


def build(name: str, trace: Path) -> Router:
    options = {key: str(trace) if value == "TRACE" else value for key, value in OPTIONS.get(name, {}).items()}
    return ROUTERS[name](**options)


def requests_of(router: Router) -> Iterator[RoutingRequest]:
    """Yield requests of every shape that the router takes: measured, checked and learned from, of two ranks."""
    for num_experts, top_k in SHAPES:
        if reason := refusal_of(partial(router.validate, num_experts, top_k)):
            assert reason.startswith(("router.", "model.")), reason
            continue
        for num_tokens, batch, layer, rank in product(
            (0, 1, 7, 64), (0, 1, WARM_UP_BATCH, CALIBRATION_BATCH), (0, 2), (0, 1)
        ):
            yield RoutingRequest(
                num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, batch=batch, layer=layer, rank=rank,
                seed=3, world_size=2,
            )  # fmt: skip


@pytest.fixture(params=sorted(ROUTERS))
def router(request: pytest.FixtureRequest, trace: Path) -> Router:
    built = build(request.param, trace)
    if built.from_model:
        pytest.skip("the model's own routers decide")
    if not any(True for _ in requests_of(built)):
        pytest.skip(f"needs options to route: OPTIONS of this file has none for {request.param}")
    return built


def test_every_token_gets_top_k_different_experts(router: Router) -> None:
    for asked in requests_of(router):
        ids = router.assign(asked)
        assert ids.shape == (asked.num_tokens, asked.top_k)
        assert ids.dtype == np.int64
        for row in ids.tolist():
            chosen = [expert for expert in row if expert != -1]
            assert len(set(chosen)) == len(chosen), "an expert twice for one token"
            assert set(chosen) <= set(range(asked.num_experts))


def test_counts_are_those_of_the_assignment(router: Router) -> None:
    """The simulator asks for counts alone."""
    for asked in requests_of(router):
        ids = router.assign(asked)
        np.testing.assert_array_equal(
            router.count(asked), np.bincount(ids[ids >= 0], minlength=asked.num_experts), err_msg=str(asked)
        )


def test_the_answer_depends_on_nothing_but_the_request(router: Router) -> None:
    """All systems of a round, all ranks and later runs are routed alike: no clock, no state, no global generator."""
    asked = list(requests_of(router))
    before = copy.deepcopy(vars(router))
    answers = [router.assign(request) for request in asked]
    np.random.seed(1)  # noqa: NPY002  (the generator that nobody may use)
    twin = replace(router)
    for request, answer in reversed(list(zip(asked, answers, strict=True))):
        np.testing.assert_array_equal(twin.assign(request), answer)
    np.testing.assert_equal(vars(router), before)
    assert router.fingerprint() == twin.fingerprint()


def test_shares_are_shares_and_remarks_are_lines(router: Router) -> None:
    for asked in requests_of(router):
        assert "\n" not in router.remark(asked)
        if isinstance(router, SharesRouter):
            shares = router.shares(asked)
            assert shares.shape == (asked.num_experts,)
            assert shares.min() >= 0
            assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_defaults_route_or_say_which_option_they_need(name: str) -> None:
    router = ROUTERS[name]()
    assert router.name == name
    assert "\n" not in router.description
    assert all(f.kw_only for f in fields(router))
    reason = refusal_of(lambda: router.validate(8, 1))
    assert not reason or re.match(r"router\.\w+: .*must ", reason), reason
