"""Figures of policies, loads, popularity, changing skew and scaling: what is drawn is what the raw tables say."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.text import Text

from analysis.data.load import load_run, load_sweep
from analysis.figures import (
    changing_skew,
    dataset_policies,
    expert_popularity,
    gpu_scaling,
    imbalance_over_iterations,
    load_balance,
    policy_sweep,
)
from analysis.figures.kit.base import FigureData, FigureModule, discover, draw_all, figure_data
from analysis.present.layout import COLUMN_IN, PAGE_IN
from analysis.present.style import dataset_look, label, look
from experiments.compose.help import CONF
from experiments.compose.sweep_callback import sweep_points
from tests.conftest import Compose
from tests.synthetic import KINDS, NUM_LAYERS, WORLD_SIZE, change_manifest, write_routing, write_run, write_sweep

SKEWS = [0.0, 0.5, 0.9]
FIVE = list(KINDS)
#: Two systems of other software beside a policy and ours, by the name of their policy.
OTHERS = {"harmoeny": [0.5, 1.0, 1.5], "static_ep": [1.0, 2.0, 3.0], "drop": [0.5, 0.5, 0.5]}
COUNTS = [[[90, 5, 3, 2], [25, 25, 25, 25], [4, 0, 0, 0]], [[25, 25, 25, 25], [25, 25, 25, 25], [1, 1, 1, 1]],
          [[70, 10, 10, 10], [40, 30, 20, 10], [2, 2, 0, 0]]]  # fmt: skip
STACKS = [0, 0, 1]


@pytest.fixture(scope="module")
def skews(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    sweep = load_sweep(write_sweep(tmp_path_factory.mktemp("results"), SKEWS))
    return figure_data(sweep.runs, sweep.points)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Two data sets with the model's own routing: on the second one all tokens go to one expert."""
    folder = tmp_path_factory.mktemp("results")
    names = ["pydoc", "constant"]
    for i, name in enumerate(names):
        write_run(folder / name, seed=i, latency_s={k: [(1 + i) * s for s in v] for k, v in OTHERS.items()})
        counts = COUNTS if i == 0 else [[[100, 0, 0, 0]] * 2 + [[4, 0, 0, 0]]] * 3
        write_routing(folder / name, counts, STACKS, "model")
        change_manifest(folder / name, dataset={"name": name})
    return figure_data([load_run(folder / name) for name in names], [{"dataset": name} for name in names])


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    folder = tmp_path_factory.mktemp("results") / "run"
    write_run(folder, latency_s={name: OTHERS.get(name, [0.25] * 3) for name in (*OTHERS, "ideal")})
    write_routing(folder, COUNTS, STACKS, "dynamic")
    return figure_data([load_run(folder)], [{}])


@pytest.fixture(scope="module")
def scaled(skews: FigureData) -> FigureData:
    """The runs as if they were three numbers of ranks at one skew, and the same a little slower at another."""
    ranks = skews.summary["router.skew"].map(dict(zip(SKEWS, (2, 4, 8), strict=True)))
    first = skews.summary.assign(world_size=ranks, **{"router.skew": 0.0})
    slower = first["throughput_tokens_per_s"] / 2
    second = first.assign(throughput_tokens_per_s=slower, **{"router.skew": 0.9})
    return FigureData(pd.concat([first, second]), ["router.skew", "world_size"], skews.caption, skews.runs)


MADE_FROM = {
    policy_sweep: "skews", dataset_policies: "texts", expert_popularity: "texts", changing_skew: "changing",
    imbalance_over_iterations: "changing", load_balance: "changing", gpu_scaling: "scaled",
}  # fmt: skip
MODULES: list[Any] = list(MADE_FROM)


def lines_of(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.lines}


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


class TestPolicies:
    def test_lines_are_medians_of_the_raw_rows(self, skews: FigureData) -> None:
        throughput, ttft = policy_sweep.plot(skews).axes
        for axes, column, scale in ((throughput, "throughput_tokens_per_s", 1e-3), (ttft, "ttft_s", 1.0)):
            lines = lines_of(axes)
            for system in FIVE:
                shown = label(system) + (" (drops tokens)" if system == "drop" else "")
                expected = [
                    scale * median(run.iterations.loc[run.iterations["system"] == system, column]) for run in skews.runs
                ]
                assert lines[shown] == pytest.approx(expected), system

    def test_systems_of_other_software_are_left_out(self, skews: FigureData) -> None:
        renamed = skews.summary.replace({"system": {"even_split": "fastmoe"}})
        data = FigureData(renamed, skews.axes, "", skews.runs)
        assert set(policy_sweep.table(data)["system"]) == set(FIVE) - {"even_split"}
        nothing = renamed[renamed["system"].isin(["harmoeny", "fastmoe"])]
        assert "several policies" in str(policy_sweep.missing(FigureData(nothing, skews.axes, "", skews.runs)))

    def test_bars_per_data_set_are_medians_of_the_raw_rows(self, texts: FigureData) -> None:
        table = dataset_policies.table(texts).set_index(["dataset", "system"])
        bars = [c for c in dataset_policies.plot(texts).axes[0].containers if isinstance(c, BarContainer)]
        for i, system in enumerate(OTHERS):
            values = [
                median(run.iterations.loc[run.iterations["system"] == system, "throughput_tokens_per_s"])
                for run in texts.runs
            ]
            found = [table.loc[(name, system), "throughput_tokens_per_s"] for name in ("pydoc", "constant")]
            assert found == pytest.approx(values)
            assert [patch.get_height() for patch in bars[i]] == pytest.approx([v / 1000 for v in values])


def test_loads_are_those_of_the_most_unequal_batch(changing: FigureData) -> None:
    layers = changing.runs[0].layers

    def unequal(rows: pd.DataFrame) -> float:
        loads = [list(r["executed_tokens"]) for _, r in rows.groupby("layer")]
        return float(sum(map(max, loads)) / (sum(map(sum, loads)) / WORLD_SIZE))

    by_batch = {
        index: {system: unequal(rows) for system, rows in batch.groupby("system")}
        for index, batch in layers.groupby("round")
    }
    worst = max(by_batch, key=lambda index: sum(by_batch[index].values()))
    table = load_balance.table(changing)
    assert set(table["round"]) == {worst}
    expected = layers[layers["round"] == worst]
    figure = load_balance.plot(changing)
    for axes, system in zip(figure.axes, changing.runs[0].systems, strict=False):
        tokens = {(r["layer"], r["rank"]): r["executed_tokens"] for r in expected.to_dict("records")
                  if r["system"] == system}  # fmt: skip
        relative = [tokens[i, rank] * WORLD_SIZE / sum(tokens[i, r] for r in range(WORLD_SIZE))
                    for i in range(NUM_LAYERS) for rank in range(WORLD_SIZE)]  # fmt: skip
        (bars,) = axes.containers
        assert isinstance(bars, BarContainer)
        assert [bar.get_height() for bar in bars] == pytest.approx(relative)
        shown = median(values[system] for values in by_batch.values())
        assert axes.get_title(loc="left") == f"{label(system)}: {shown:.2f}"


def test_popularity_is_the_sorted_share_of_all_batches(texts: FigureData) -> None:
    table = expert_popularity.table(texts).set_index(["dataset", "stack", "position"])
    totals = [[sum(batch[layer][expert] for batch in COUNTS) for expert in range(4)] for layer in range(3)]
    shares = [sorted((value / sum(layer) for value in layer), reverse=True) for layer in totals]
    for position in range(4):
        encoder = [shares[0][position], shares[1][position]]
        assert table.loc[("pydoc", 0, position + 1), "share"] == pytest.approx(sum(encoder) / 2)
        assert table.loc[("pydoc", 0, position + 1), "share_low"] == pytest.approx(min(encoder))
        assert table.loc[("pydoc", 1, position + 1), "share"] == pytest.approx(shares[2][position])
        assert table.loc[("constant", 0, position + 1), "share"] == (1.0 if position == 0 else 0.0)
    encoder_panel, decoder_panel = expert_popularity.plot(texts).axes
    assert lines_of(decoder_panel)["pydoc"] == pytest.approx([100 * share for share in shares[2]])
    assert encoder_panel.get_title(loc="left") == "switch, encoder: 2 MoE layers"


def test_popularity_needs_a_routing_that_was_recorded_and_depends_on_the_text(
    texts: FigureData, changing: FigureData, tmp_path: Path
) -> None:
    assert "depends on the text" in str(expert_popularity.missing(changing))
    folder = write_run(tmp_path / "run").folder
    change_manifest(folder, point={"router": "model"})
    assert "did not record" in str(expert_popularity.missing(figure_data([load_run(folder)], [{}])))


class TestChangingSkew:
    def test_throughput_and_gini_by_hand(self, changing: FigureData) -> None:
        table = changing_skew.table(changing).set_index(["round", "system"])
        iterations = changing.runs[0].iterations.set_index(["round", "system"])["throughput_tokens_per_s"]
        assert table["throughput_tokens_per_s"].to_dict() == pytest.approx(iterations.to_dict())
        # Round 1 is even; in round 0 layers of 100, 100 and 4 assignments have these mean differences of pairs.
        pairs = [sum(abs(a - b) for a in layer for b in layer) / 16 for layer in COUNTS[0]]
        ginis = [pair / (2 * sum(layer) / 4) for pair, layer in zip(pairs, COUNTS[0], strict=True)]
        expected = (100 * ginis[0] + 100 * ginis[1] + 4 * ginis[2]) / 204
        assert table.loc[(0, "harmoeny"), "gini"] == pytest.approx(expected)
        assert table.loc[(1, "harmoeny"), "gini"] == pytest.approx(0)
        above, below = changing_skew.plot(changing).axes
        assert np.asarray(above.lines[0].get_ydata()).tolist() == pytest.approx([expected, 0.0, table.iloc[-1]["gini"]])
        assert lines_of(below)["HarMoEny"] == pytest.approx([1000 / s / 1000 for s in OTHERS["harmoeny"]])

    def test_imbalance_by_hand(self, changing: FigureData) -> None:
        lines = lines_of(imbalance_over_iterations.plot(changing).axes[1])
        rows = changing.runs[0].layers
        for system, shown in (("harmoeny", "HarMoEny"), ("static_ep", "Static EP")):
            expected = []
            for index in range(3):
                part = rows[(rows["system"] == system) & (rows["round"] == index)]
                loads = [list(r["executed_tokens"]) for _, r in part.groupby("layer")]
                expected.append(sum(map(max, loads)) / (sum(map(sum, loads)) / WORLD_SIZE))
            assert lines[shown] == pytest.approx(expected)

    def test_the_skew_has_to_change(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", latency_s=OTHERS).folder
        write_routing(folder, [COUNTS[0]] * 3, STACKS, "skew")
        same = figure_data([load_run(folder)], [{}])
        for module in (changing_skew, imbalance_over_iterations):
            assert "python run.py experiment=changing_skew" in str(module.missing(same))


def test_scaling_has_a_column_per_skew(scaled: FigureData) -> None:
    axes = gpu_scaling.plot(scaled).axes
    assert [a.get_title(loc="left") for a in axes[:2]] == ["Skew 0", "Skew 0.9"]
    expected = [
        median(run.iterations.loc[run.iterations["system"] == "static_ep", "throughput_tokens_per_s"]) / 1000
        for run in scaled.runs
    ]
    assert lines_of(axes[0])["Static EP"] == pytest.approx(expected)
    assert lines_of(axes[1])["Static EP"] == pytest.approx([value / 2 for value in expected])
    one = FigureData(scaled.summary, ["world_size"], "", scaled.runs)
    assert "one more option" in str(gpu_scaling.missing(one))


def test_variants_and_data_sets_have_looks_of_their_own() -> None:
    names = [f"harmoeny_threshold_{n}" for n in (1, 8, 32, 128, 512)]
    assert len({look(name) for name in (*names, "harmoeny")}) == 6
    assert all(re.fullmatch(r"#[0-9A-F]{6}", look(name).colour) for name in names)
    known = ["pydoc", "constant", "skewed_tokens", "random"]
    assert len({dataset_look(name) for name in known}) == len(known)
    assert dataset_look("a newcomer") == dataset_look("a newcomer")
