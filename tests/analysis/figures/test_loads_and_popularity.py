"""Figures of loads, popularity and changing skew: what is drawn is what the raw tables say."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer

from analysis.data.load import load_run
from analysis.figures import changing_skew, expert_popularity, imbalance_over_iterations, load_balance
from analysis.figures.kit.base import FigureData, figure_data
from analysis.present.style import label
from tests.analysis.figures.runs import COUNTS, OTHERS, STACKS, lines_of
from tests.synthetic import NUM_LAYERS, WORLD_SIZE, change_manifest, write_routing, write_run


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


def test_popularity_is_the_sorted_share_of_all_batches(routed_texts: FigureData) -> None:
    table = expert_popularity.table(routed_texts).set_index(["dataset", "stack", "position"])
    totals = [[sum(batch[layer][expert] for batch in COUNTS) for expert in range(4)] for layer in range(3)]
    shares = [sorted((value / sum(layer) for value in layer), reverse=True) for layer in totals]
    for position in range(4):
        encoder = [shares[0][position], shares[1][position]]
        assert table.loc[("pydoc", 0, position + 1), "share"] == pytest.approx(sum(encoder) / 2)
        assert table.loc[("pydoc", 0, position + 1), "share_low"] == pytest.approx(min(encoder))
        assert table.loc[("pydoc", 1, position + 1), "share"] == pytest.approx(shares[2][position])
        assert table.loc[("constant", 0, position + 1), "share"] == (1.0 if position == 0 else 0.0)
    encoder_panel, decoder_panel = expert_popularity.plot(routed_texts).axes
    assert lines_of(decoder_panel)["pydoc"] == pytest.approx([100 * share for share in shares[2]])
    assert encoder_panel.get_title(loc="left") == "switch, encoder: 2 MoE layers"


def test_popularity_needs_a_routing_that_was_recorded_and_depends_on_the_text(
    routed_texts: FigureData, changing: FigureData, tmp_path: Path
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
