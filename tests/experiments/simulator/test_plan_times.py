"""Simulations that are repeated give the same figures, though policies are timed on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from baselines.static_ep import StaticEP
from experiments.files import cache_dir
from experiments.simulator.backend import simulate
from experiments.simulator.plan_times import PlanTimes
from harmoeny.placement import Placement, place
from harmoeny.rebalance import TokenHarMoEny
from results_schema.tables import LAYERS
from tests.conftest import Load

COUNTS = np.array([[3, 1], [2, 2]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path))
    return tmp_path


def placement() -> Placement:
    return place("contiguous", 2, 2)


def known(times: PlanTimes) -> float:
    """The kept time; a test's clock says -1 where nothing is kept."""
    return times.seconds(COUNTS, placement(), lambda: -1.0)


def keep(policy: TokenHarMoEny | StaticEP, seconds: float) -> Path:
    times = PlanTimes.of(policy)
    assert times.seconds(COUNTS, placement(), lambda: seconds) == seconds
    times.save()
    (path,) = cache_dir().glob(f"plan-times-{policy.name}-*")
    return path


@pytest.mark.parametrize("costs", ["runtime", "bench"])
def test_a_simulation_is_the_same_twice(costs: str, load: Load, cache: Path) -> None:
    words = ("model=moe_stack", "backend=simulator", "hardware=dgx_h100", "rounds=2", "router.skew=0.5")
    point = load(*words, f"simulator={costs}")
    first, second = (simulate(point).tables(point)[LAYERS] for _ in range(2))
    assert (first["plan_s"] > 0).all()
    pd.testing.assert_frame_equal(first, second)
    timed = {path.name.split("-")[2] for path in cache.glob("plan-times-*")}
    assert timed == (set(point.systems) if costs == "runtime" else set()), "no plan is timed where its time is known"


def test_a_time_is_kept_for_what_was_planned() -> None:
    keep(TokenHarMoEny(threshold=4), 0.5)
    times = PlanTimes.of(TokenHarMoEny(threshold=4))
    assert known(times) == 0.5
    assert times.seconds(COUNTS + 1, placement(), lambda: -1.0) == -1.0, "of other counts"
    assert times.seconds(COUNTS, place("contiguous", 2, 1), lambda: -1.0) == -1.0, "of another placement"


def test_another_policy_or_option_is_timed_anew() -> None:
    keep(TokenHarMoEny(threshold=4), 0.5)
    assert known(PlanTimes.of(TokenHarMoEny(threshold=8))) == -1.0
    assert known(PlanTimes.of(StaticEP())) == -1.0


@pytest.mark.parametrize("content", ["", '{"2x2 ', "[]", '{"2x2 0": "fast"}', '{"2x2 0": NaN}', "\x00\xff"])
def test_a_damaged_file_counts_as_nothing(content: str) -> None:
    path = keep(StaticEP(), 0.5)
    path.write_bytes(content.encode("latin-1"))
    assert known(PlanTimes.of(StaticEP())) == -1.0


def test_a_changed_digit_counts_as_nothing() -> None:
    path = keep(StaticEP(), 0.5)
    assert b"0.5" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    assert known(PlanTimes.of(StaticEP())) == -1.0


def test_a_cache_that_cannot_be_written_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("HARMOENY_CACHE", str(cache / "file" / "folder"))
    times = PlanTimes.of(StaticEP())
    assert known(times) == -1.0
    times.save()
    assert "plan times are not kept: HARMOENY_CACHE" in capsys.readouterr().err
