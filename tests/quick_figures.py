"""What matplotlib works out anew for every file, once for all tests, and with few dots: a quarter of drawing's time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import plotly.graph_objects as go
import pytest
from matplotlib.backends import _backend_pdf_ps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from analysis.present.style import RC

#: Dots per inch, at most, of a PNG that nobody looks at.
_DPI = 80
_PRINTABLE = range(32, 127)


class _Subset(NamedTuple):
    """Part of a font, in place of matplotlib's own `SubsetResults`."""

    font: bytes
    glyph_index_map: dict[int, int]


@contextmanager
def drawn_quickly() -> Iterator[None]:
    """In this block, measure a text once, cut fonts for PDFs once, to the letters that any needs, and draw few dots."""
    with pytest.MonkeyPatch.context() as patch:
        sizes: dict[Any, Any] = {}

        def size(renderer: Any, text: str, font: Any, ismath: Any, dpi: float) -> Any:
            key = (type(renderer), text, font.copy(), ismath, dpi)
            if key not in sizes:
                sizes[key] = renderer.get_text_width_height_descent(text, font, ismath)
            return sizes[key]

        patch.setattr(mpl.text, "_get_text_metrics_with_cache", size)
        set_dpi = Figure.set_dpi
        patch.setattr(Figure, "set_dpi", lambda figure, dpi: set_dpi(figure, min(dpi, _DPI)))
        if hasattr(_backend_pdf_ps, "SubsetResults"):  # as of matplotlib 3.11
            _cut_fonts_once(patch)
        yield


def _cut_fonts_once(patch: pytest.MonkeyPatch) -> None:
    fonts: Any = _backend_pdf_ps
    subset, as_file = fonts.get_glyphs_subset, fonts.font_as_file
    known: dict[Any, _Subset] = {}

    def remembered(fontfile: Any, glyphs: Collection[int]) -> AbstractContextManager[_Subset]:
        has = set(known[fontfile].glyph_index_map) if fontfile in known else _printable(fontfile)
        if fontfile not in known or not has >= set(glyphs):
            with subset(fontfile, has | set(glyphs)) as made:
                known[fontfile] = _Subset(as_file(made.font).getvalue(), dict(made.glyph_index_map))
        return nullcontext(known[fontfile])

    patch.setattr(fonts, "get_glyphs_subset", remembered)
    patch.setattr(fonts, "font_as_file", BytesIO)


def draw_once() -> None:
    """Load what matplotlib and Plotly load for the first figure, and cut its font."""
    go.Figure([go.Bar(x=[1], y=[1]), go.Scatter(x=[1], y=[1])], go.Layout()).to_plotly_json()
    figure = Figure(figsize=(1, 1), layout="constrained")
    figure.subplots().set_title("title")
    with mpl.rc_context(cast(Any, RC)):
        for canvas, suffix in ((FigureCanvasAgg, "png"), (FigureCanvasPdf, "pdf")):
            canvas(figure).print_figure(BytesIO(), format=suffix)


def _printable(fontfile: Any) -> set[int]:
    glyph_of = FT2Font(fontfile).get_charmap()
    return {glyph_of[letter] for letter in _PRINTABLE if letter in glyph_of}
