"""Figures of policies and of numbers of ranks: what is drawn is what the raw tables say."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import pandas as pd
import pytest
from matplotlib.container import BarContainer

from analysis.figures import dataset_policies, gpu_scaling, option_sweep, policy_sweep
from analysis.figures.kit.base import FigureData
from analysis.present.style import label
from tests.analysis.figures.runs import FIVE, OTHERS, lines_of


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

    def test_bars_per_data_set_are_medians_of_the_raw_rows(self, routed_texts: FigureData) -> None:
        table = dataset_policies.table(routed_texts).set_index(["dataset", "system"])
        bars = [c for c in dataset_policies.plot(routed_texts).axes[0].containers if isinstance(c, BarContainer)]
        for i, system in enumerate(OTHERS):
            values = [
                median(run.iterations.loc[run.iterations["system"] == system, "throughput_tokens_per_s"])
                for run in routed_texts.runs
            ]
            found = [table.loc[(name, system), "throughput_tokens_per_s"] for name in ("pydoc", "constant")]
            assert found == pytest.approx(values)
            assert [patch.get_height() for patch in bars[i]] == pytest.approx([v / 1000 for v in values])


def test_scaling_has_a_column_per_skew(ranks_by_skew: FigureData) -> None:
    axes = gpu_scaling.plot(ranks_by_skew).axes
    assert [a.get_title(loc="left") for a in axes[:2]] == ["Skew 0", "Skew 0.9"]
    expected = [
        median(run.iterations.loc[run.iterations["system"] == "static_ep", "throughput_tokens_per_s"]) / 1000
        for run in ranks_by_skew.runs
    ]
    assert lines_of(axes[0])["Static EP"] == pytest.approx(expected)
    assert lines_of(axes[1])["Static EP"] == pytest.approx([value / 2 for value in expected])
    one = FigureData(ranks_by_skew.summary, ["world_size"], "", ranks_by_skew.runs)
    assert "one more option" in str(gpu_scaling.missing(one))


class TestOptionSweep:
    def test_values_are_in_order_and_bars_are_the_medians(self, batches: FigureData) -> None:
        throughput, *_, idle = option_sweep.plot(batches).axes
        assert [tick.get_text() for tick in idle.get_xticklabels()] == ["1", "4", "16"]
        rows = batches.summary[batches.summary["system"] == "harmoeny"].set_index("batch_size")
        containers = [c for c in throughput.containers if isinstance(c, BarContainer)]
        (bars,) = [c for c in containers if c.get_label() == "HarMoEny"]
        wanted = rows.loc[[1, 4, 16], "throughput_tokens_per_s"] / 1000
        assert [bar.get_height() for bar in bars.patches] == pytest.approx(wanted.tolist())

    @pytest.mark.parametrize("values", [(True, False, None), ("a", "b", "c"), (0.1, 1e-9, 3), ([1], [2], [3])])
    def test_values_of_any_kind(self, batches: FigureData, values: tuple[Any, ...]) -> None:
        column = pd.Series([values[(16, 4, 1).index(b)] for b in batches.summary["batch_size"]], dtype=object)
        data = replace(batches, summary=batches.summary.assign(batch_size=column.to_numpy()))
        assert option_sweep.missing(data) is None
        labels = [tick.get_text() for tick in option_sweep.plot(data).axes[-1].get_xticklabels()]
        assert len(labels) == 3

    def test_sweeps_with_figures_of_their_own_are_left_to_them(self, skews: FigureData, batches: FigureData) -> None:
        assert "router.skew has figures of its own" in str(option_sweep.missing(skews))
        several = replace(batches, axes=["batch_size", "seed"])
        assert "differ in batch_size, seed" in str(option_sweep.missing(several))
