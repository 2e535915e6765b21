from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.compose.help import CONF
from experiments.registry import discover
from scripts.bench.plan_model import PRESETS, fit


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    entries, fetches = np.array([8e3, 3e5, 1e6, 1e6]), np.array([0.0, 10.0, 0.0, 40.0])
    seconds = 5e-6 + 1e-10 * entries + 2e-6 * fetches
    assert fit(np.column_stack([seconds, entries, fetches])) == pytest.approx([5e-6, 1e-10, 2e-6])


def test_nothing_is_below_zero_and_every_sample_counts_by_its_share() -> None:
    entries = np.array([1.0, 2.0, 1000.0])
    measured = np.column_stack([entries * 1e-6, entries, np.zeros(3)])
    assert fit(measured) == pytest.approx([0.0, 1e-6, 0.0], abs=1e-12)
    measured[:, 0] = [3e-6, 2e-6, 1e-6]  # the more, the faster
    assert (fit(measured) >= 0).all()


def test_every_system_of_the_grid_has_its_plan_times() -> None:
    found = yaml.safe_load(Path(CONF, "simulator", "bench.yaml").read_text())["software"]
    assert set(discover("system")[0]) | set(PRESETS) <= set(found)
