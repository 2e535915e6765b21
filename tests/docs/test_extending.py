"""The worked examples of docs/extending.md work: the policy keeps what every policy must, in the real runtime too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures.base import draw_all, figure_data
from analysis.load import load_run
from experiments.choices import CONF
from harmoeny.placement import place
from tests.harmoeny.runtime.cases import random_tokens
from tests.harmoeny.runtime.test_engine import run_layers
from tests.synthetic import write_run

PAGE = CONF.parent / "docs" / "extending.md"


def example(file: str) -> ModuleType:
    """Execute the example that the page says to save under a name."""
    text = PAGE.read_text(encoding="utf-8")
    code = text.split(f"`{file}`:\n\n```python\n", 1)[1].split("```", 1)[0]
    module = ModuleType(f"{Path(file).stem}_of_the_docs")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def scatter() -> Any:
    module = example("baselines/scatter.py")
    yield module.__dict__["Scatter"]
    del sys.modules[module.__name__]


def test_it_plans_what_its_docstring_says(scatter: Any) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (4, 6))
    placement = place("contiguous", 6, 4)
    plan = scatter(stride=3).plan(counts, placement)
    plan.validate(counts, placement)
    for expert in range(6):
        assert (plan.tokens[:, expert, expert * 3 % 4] == counts[:, expert]).all()


def test_it_refuses_what_it_cannot_do(scatter: Any) -> None:
    with pytest.raises(ValueError, match="stride: 0, must be at least 1"):
        scatter(stride=0).validate()


def test_it_is_exact_in_the_runtime(scatter: Any) -> None:
    tokens = [[random_tokens(rank, 12, 6, 2) for rank in range(3)] for _ in range(2)]
    run_layers(3, scatter(), tokens, num_experts=6)


@pytest.mark.parametrize("file", ["baselines/scatter.py", "analysis/figures/hidden_fetches.py"])
def test_examples_lie_nowhere_yet(file: str) -> None:
    assert not Path(CONF.parent, file).exists()


def test_the_worked_figure_is_drawn_like_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = example("analysis/figures/hidden_fetches.py")
    run = load_run(write_run(tmp_path / "run").folder)
    monkeypatch.setattr("analysis.figures.base.discover", lambda: [figure])
    (drawn,), lacking = draw_all(figure_data([run], [{}]), tmp_path)
    assert (drawn.name, lacking) == ("hidden_fetches.png", {})
    shares = pd.read_csv(drawn.with_suffix(".csv")).set_index("system")["fetch_hidden_share"]
    for system in run.systems:
        rows = run.layers[run.layers["system"] == system].groupby("round")[["fetch_wait_s", "fetch_s"]].sum()
        hidden = [
            1 - wait / fetch if fetch else 1.0
            for wait, fetch in zip(rows["fetch_wait_s"], rows["fetch_s"], strict=True)
        ]
        assert shares[system] == pytest.approx(np.median(hidden))
    assert figure.missing(figure_data([run, run], [{}, {}])) == (
        "needs one run with fetches: python run.py experiment=prefetch_ablation"
    )
