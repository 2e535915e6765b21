"""The map of an ablation: variants to the whole, paired by round."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from analysis.figures import ablation
from analysis.figures.kit.base import FigureData


def test_ratios_are_to_the_whole_system_round_by_round(without_parts: FigureData) -> None:
    table = ablation.table(without_parts)
    assert table["seq_len"].tolist() == [16, 16, 1024, 1024]
    assert table["system"].tolist() == ["harmoeny_without_settling", "harmoeny_without_overlap"] * 2
    for column in ("ratio", "low", "high"):
        assert table[column].tolist() == pytest.approx([0.5, 1.0] * 2)


def test_cells_say_the_ratios_and_rows_the_parts(without_parts: FigureData) -> None:
    (axes,) = ablation.plot(without_parts).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["without settling", "without overlap"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "1024"]
    cells = [text.get_text() for text in axes.texts if isinstance(text, Text)]
    assert cells == ["0.50", "0.50", "1.00", "1.00"]


def test_a_sweep_without_variants_is_refused(skews: FigureData) -> None:
    assert "harmoeny_without_" in str(ablation.missing(skews))
