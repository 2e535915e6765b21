from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.routers.base import RoutingRequest
from experiments.routers.trace import TraceRouter
from experiments.routing.trace_files import write_trace
from tests.experiments.routing.test_trace import random_trace


def _adapted(tmp_path: Path, **options: Any) -> TraceRouter:
    trace, _ = random_trace(3, world_size=1, num_experts=8, token_paths=False, path=str(tmp_path / "t.parquet"))
    write_trace(trace, "run")
    return TraceRouter(path=trace.path, adapt=True, **options)


def _count(router: TraceRouter, batch: int) -> np.ndarray:
    request = RoutingRequest(
        num_tokens=50_000, num_experts=8, top_k=1, batch=batch, layer=0, rank=0, seed=0, world_size=1
    )
    counts: np.ndarray = router.count(request) / 50_000
    return counts


def test_recorded_shares_are_sharpened_and_evened_out(tmp_path: Path) -> None:
    recorded = _count(_adapted(tmp_path), 0)
    for power in (0.5, 2.0):
        wanted = recorded**power / (recorded**power).sum()
        np.testing.assert_allclose(_count(_adapted(tmp_path, sharpness=power), 0), wanted, atol=1e-3)


def test_drift_is_taken_away_and_made_complete(tmp_path: Path) -> None:
    recorded = [_count(_adapted(tmp_path), batch) for batch in (0, 1)]
    still = [_count(_adapted(tmp_path, drift="none"), batch) for batch in (0, 1)]
    np.testing.assert_array_equal(still[0], still[1])
    assert (still[0] >= np.minimum(*recorded) - 1e-3).all()
    assert (still[0] <= np.maximum(*recorded) + 1e-3).all()
    moved = _count(_adapted(tmp_path, drift="full"), 0)
    np.testing.assert_allclose(np.sort(moved), np.sort(recorded[0]), atol=1e-4)
    assert np.abs(moved - recorded[0]).max() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpness": 0.0}, r"router\.sharpness: 0\.0, must be a number above 0, or null"),
        ({"drift": "some"}, r"router\.drift: 'some', must be one of none, full, or null"),
        ({"drift": "none", "adapt": False}, r"router\.drift: 'none', must be null without router\.adapt=true"),
        ({"sharpness": 2.0, "adapt": False}, r"router\.sharpness: 2\.0, must be null without router\.adapt=true"),
    ],
)
def test_changes_that_are_none_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    router = replace(_adapted(tmp_path), **options)
    with pytest.raises(ValueError, match=message):
        router.validate(8, 2)


def test_the_size_of_a_recorded_batch_is_known(tmp_path: Path) -> None:
    assert _adapted(tmp_path).recorded_tokens() == 12


def test_tokens_after_a_prompt_have_the_popularity_of_their_layer_and_batch(tmp_path: Path) -> None:
    router = _adapted(tmp_path)
    request = RoutingRequest(
        num_tokens=50_000, num_experts=8, top_k=1, batch=1, layer=0, rank=0, seed=0, world_size=1, num_layers=2
    )
    counts = [router.count(replace(request, layer=layer)) / 50_000 for layer in range(6)]
    for step in (1, 2):  # a model of two layers, whose second step begins at layer 4, which is its first again
        for layer in (0, 1):
            np.testing.assert_allclose(counts[2 * step + layer], counts[layer], atol=1e-3)
    assert np.abs(counts[0] - counts[1]).max() > 0.02
    assert router.why_no_steps() == ""
    assert "router.adapt=true" in replace(router, adapt=False).why_no_steps()
