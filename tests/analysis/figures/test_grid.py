"""The map of a grid: every cell has the colour of its own point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from analysis.figures import grid as figure
from analysis.figures.kit.base import FigureData
from analysis.present.style import label, look


def panels(data: FigureData) -> list[Axes]:
    """Return the panels of both maps, without the colour bar."""
    return [axes for axes in figure.plot(data).findobj(Axes) if isinstance(axes, Axes) and axes.images]


def test_the_table_has_our_lowest_ratio_first_with_the_rival(grid: FigureData) -> None:
    table = figure.table(grid)
    assert len(table) == grid.summary["run_id"].nunique() == 24
    # HarMoEny takes half of static EP's time, or twice of it where it is four times slower.
    assert table["ratio"].tolist() == pytest.approx([0.5] * 12 + [2.0] * 12)
    assert set(table["seq_len"][:12]) == {2048}
    assert set(table["rival"]) == {"static_ep"}
    assert table["winner"].tolist() == ["static_ep"] * 12 + ["harmoeny"] * 12


def test_cells_have_the_colours_of_their_points(grid: FigureData) -> None:
    ratios, winners = np.split(np.array(panels(grid)), 2)
    assert len(ratios) == len(winners) == 4
    empty = np.array(to_rgb("#e8e8e8"))
    for axes in winners:
        image = np.asarray(axes.images[0].get_array())
        assert image.shape == (2, 4, 3)  # routers; sizes x slots
        moving, uniform = image  # in the order of their names
        assert moving[::2] == pytest.approx(np.stack([empty, empty]))
        for row, columns in ((uniform, (0, 1)), (moving, (1,))):
            assert row[list(columns)] == pytest.approx(np.array([to_rgb(look("harmoeny").colour)] * len(columns)))
        for cell in (moving[3], uniform[2], uniform[3]):
            assert cell == pytest.approx(to_rgb(look("static_ep").colour))
    for axes in ratios:
        image = np.asarray(axes.images[0].get_array())
        # Orange above 1, violet below.
        assert image[1, 0, 0] > image[1, 0, 2]
        assert image[1, 2, 0] < image[1, 2, 2]


def test_the_legend_counts_points(grid: FigureData) -> None:
    legend = [text.get_text() for part in figure.plot(grid).subfigs for legend in part.legends for text in legend.texts]
    assert sorted(legend) == sorted([f"{label('harmoeny')} 12", f"{label('static_ep')} 12"])


def test_other_sweeps_are_refused(grid: FigureData) -> None:
    assert "machine" in str(figure.missing(replace(grid, axes=["machine", "model"])))
    others = grid.summary[grid.summary["system"] != "harmoeny"]
    assert "harmoeny among the systems" in str(figure.missing(replace(grid, summary=others)))
    assert figure.missing(grid) is None
