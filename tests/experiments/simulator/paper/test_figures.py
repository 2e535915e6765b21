from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.compose.compose import compose_point
from experiments.routers.base import RoutingRequest
from experiments.routers.paper_skew import PaperSkewRouter
from experiments.simulator.paper.figures import spread, throughputs
from experiments.simulator.paper.validation import PaperMachine, compare_throughputs, summarise_errors, wrong_rankings

REFERENCE = Path(__file__).resolve().parents[5] / "shared" / "reference" / "harmoeny-paper"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the authors' data are not in {REFERENCE}")
SYSTEMS = ("harmoeny", "fastmoe", "fastermoe", "exflow", "deepspeed_moe")


def request(num_tokens: int, **others: Any) -> RoutingRequest:
    values = {"num_experts": 8, "top_k": 1, "batch": 0, "layer": 0, "rank": 0, "seed": 0, "world_size": 8}
    return RoutingRequest(num_tokens=num_tokens, **(values | others))


@needs_reference
def test_the_papers_systems_are_predicted_where_nothing_was_fitted() -> None:
    # ExFlow's integer programme takes 17 s here, and hardly improves on the search before it.
    settings = ("experiment=paper_gpus", "systems.exflow.node_limit=0", "results_dir=/tmp")
    machine = PaperMachine(compose_point(*settings))
    points = [p for p in throughputs(REFERENCE) if p.skew in (0.5, 0.9) and p.system in SYSTEMS]
    assert len(points) == 10
    frame = compare_throughputs(machine, REFERENCE, points, num_batches=1)
    assert not frame["calibration"].any()
    assert summarise_errors(frame)["median"] <= 0.10
    assert wrong_rankings(frame) == []


@needs_reference
def test_the_papers_router_gives_the_recorded_frequencies() -> None:
    recorded = pd.read_csv(REFERENCE / "expert_freq_switch128_skew.csv")
    experts = [str(e) for e in range(128)]
    for skew, rows in recorded[recorded["layer_idx"] == 0].groupby("router_skew"):
        shares = rows[experts].to_numpy() / rows[experts].to_numpy().sum(axis=1, keepdims=True)
        counts = PaperSkewRouter(skew=float(skew)).count(request(65536, num_experts=128))  # type: ignore[arg-type]
        assert counts[0] / 65536 == pytest.approx(shares[:, 0].mean(), abs=0.005)
        assert counts.max() / 65536 == pytest.approx(shares.max(axis=1).mean(), rel=0.05)


@needs_reference
def test_all_figures_are_read_once() -> None:
    points = throughputs(REFERENCE)
    assert len(points) == 8 * 3 + 8 * 4
    by_case = {(p.system, p.case): p for p in points}
    assert by_case["static_ep", "skew 0.9"].sequences_per_s == pytest.approx(103.0878)
    assert by_case["static_ep", "skew 0.9"].batch_size == 18
    assert {p.case for p in points if p.calibration} == {"skew 0"}


def test_the_papers_router_assigns_what_it_counts() -> None:
    for top_k, skew in ((1, 0.0), (1, 0.7), (3, 0.9)):
        routed = request(500, top_k=top_k, batch=2, layer=1, rank=3, seed=7)
        router = PaperSkewRouter(skew=skew)
        chosen = router.assign(routed)
        np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=8), router.count(routed))
        assert all(len(set(row)) == top_k for row in chosen.tolist())
        assert np.mean((chosen == 0).any(axis=1)) == pytest.approx(skew, abs=0.06)


def test_all_ranks_get_the_papers_same_numbers() -> None:
    router = PaperSkewRouter(skew=0.3)
    first, second = (router.count(request(500, rank=rank)) for rank in (0, 5))
    np.testing.assert_array_equal(first, second)


def test_spreading_rounds_to_the_whole() -> None:
    counts = spread(np.array([0.5, 0.3, 0.2]), 7)
    assert counts.tolist() == [[4, 2, 1]] * 8


def test_rankings_are_wrong_only_where_figures_clearly_differ() -> None:
    frame = pd.DataFrame(
        [
            {"case": "a", "system": "x", "published": 100.0, "predicted": 90.0},
            {"case": "a", "system": "y", "published": 104.0, "predicted": 80.0},
            {"case": "a", "system": "z", "published": 120.0, "predicted": 85.0},
        ]
    )
    assert wrong_rankings(frame) == ["a: x and z"]
