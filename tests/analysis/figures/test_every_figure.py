"""What every figure must keep: its files, its caption, its refusal of other results, its experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from analysis.figures import (
    ablation,
    changing_skew,
    dataset_policies,
    expert_popularity,
    expert_stages,
    gpu_scaling,
    grid,
    imbalance_over_iterations,
    load_balance,
    memory_parts,
    memory_sweep,
    option_sweep,
    policy_sweep,
    predicted_time,
    serving_rates,
    ways_indexes,
)
from analysis.figures.kit.base import FigureModule, discover, draw_all
from analysis.present.layout import COLUMN_IN, PAGE_IN
from experiments.compose.help import CONF
from experiments.compose.swept import sweep_points
from tests.conftest import Compose

MADE_FROM = {
    policy_sweep: "skews", gpu_scaling: "ranks_by_skew",
    dataset_policies: "routed_texts", expert_popularity: "routed_texts",
    option_sweep: "batches", changing_skew: "changing", imbalance_over_iterations: "changing", load_balance: "changing",
    grid: "grid", predicted_time: "predicting", ablation: "without_parts",
    serving_rates: "rates", memory_sweep: "small_memory", expert_stages: "stages",
    memory_parts: "parts", ways_indexes: "shapes",
}  # fmt: skip
MODULES: list[Any] = list(MADE_FROM)


@pytest.mark.many
@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.NAME))
class TestEveryFigure:
    def test_is_written_as_png_pdf_and_csv(
        self, module: FigureModule, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        data = request.getfixturevalue(MADE_FROM[module])  # type: ignore[index]
        (path,), lacking = draw_all(data, tmp_path, [module.NAME])
        assert (path.name, lacking) == (f"{module.NAME}.png", {})
        assert (np.asarray(matplotlib.image.imread(path)).std(axis=(0, 1))[:3] > 0.01).all()  # not blank
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
        pd.testing.assert_frame_equal(
            pd.read_csv(path.with_suffix(".csv")), module.table(data).reset_index(drop=True), check_dtype=False
        )

    def test_says_backend_and_device_and_can_be_printed_as_it_is(
        self, module: FigureModule, request: pytest.FixtureRequest
    ) -> None:
        figure = module.plot(request.getfixturevalue(MADE_FROM[module]))  # type: ignore[index]
        texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
        said = " ".join(text.get_text() for text in texts).replace("\n", " ")
        assert "gloo, CPU of tests" in said
        assert figure.get_figwidth() in (COLUMN_IN, PAGE_IN)
        assert min(float(text.get_fontsize()) for text in texts) >= 7

    def test_other_results_are_refused_with_a_command(
        self, module: FigureModule, request: pytest.FixtureRequest
    ) -> None:
        others = {name for name in MADE_FROM.values() if name != MADE_FROM[module]}  # type: ignore[index]
        reasons = [module.missing(request.getfixturevalue(name)) for name in sorted(others)]
        assert any(reason is not None and module.SOURCE.command in reason for reason in reasons)


#: What goes beyond an experiment as it is; tests of conf compose those.
SIMULATIONS = sorted({m.SOURCE.simulated for m in discover() if " " in m.SOURCE.simulated})


@pytest.mark.many
@pytest.mark.parametrize("options", SIMULATIONS, ids=lambda options: options.split()[0])
def test_simulations_are_valid_at_all_their_points(options: str, compose: Compose, tmp_path: Path) -> None:
    points, _ = sweep_points(compose(*options.split(), f"results_dir={tmp_path}", multirun=True))
    assert {point.options.backend for point, _ in points} == {"simulator"}


def test_every_figure_names_experiments_that_exist() -> None:
    for module in discover():
        for options in (module.SOURCE.command.removeprefix("python run.py "), module.SOURCE.simulated):
            name = options.split()[0].removeprefix("experiment=")
            config = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
            if module.SOURCE.minutes is None or options.startswith("experiment=paper_"):
                assert "backend: simulator" in config or "paper_gpus" in config
