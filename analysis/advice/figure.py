"""Gain over static expert parallelism against tokens per rank, with the band inside the error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from analysis.advice.choose import Verdict
from analysis.present.layout import PAGE_IN, entries_of, new_figure, save_figure, set_caption, set_legend
from analysis.present.style import RC, label, look

NAME = "advice_gains"
#: Systems that are nowhere near this are not drawn: the axis would show nothing but them.
_LEAST_GAIN = 0.7


def draw_gains(verdicts: Sequence[Verdict], folder: Path, caption: str) -> Path:
    """Draw the gains of every policy's best setting at every size as PNG and PDF; return the PNG file.

    Args:
        verdicts: one per size, of the same memory.
        folder: where to put it.
        caption: what the numbers are of.
    """
    with mpl.rc_context(cast(Any, RC)):
        return save_figure(plot(verdicts, caption), folder, NAME)


def plot(verdicts: Sequence[Verdict], caption: str) -> Figure:
    """Draw a line per policy."""
    figure = new_figure(PAGE_IN, 3.6)
    axes = figure.subplots()
    ordered = sorted(verdicts, key=lambda one: one.tokens)
    error = ordered[0].error
    axes.axhspan(1 / (1 + error), 1 + error, color="#555555", alpha=0.12, linewidth=0)
    axes.axhline(1.0, color="#555555", linewidth=0.8)
    for policy in dict.fromkeys(gain.policy for one in ordered for gain in one.gains):
        points = [(one.tokens, gain) for one in ordered for gain in one.gains if gain.policy == policy]
        if all(gain.gain < _LEAST_GAIN for _, gain in points):
            continue
        style, settings = look(policy), {gain.system for _, gain in points}
        values = [gain.gain for _, gain in points]
        ends = [[v - gain.low for v, (_, gain) in zip(values, points, strict=True)]]
        ends.append([gain.high - v for v, (_, gain) in zip(values, points, strict=True)])
        axes.errorbar(
            [tokens for tokens, _ in points], values, yerr=ends, color=style.colour, marker=style.marker,
            markersize=4, linewidth=1.2, elinewidth=0.8, label=label(settings.pop() if len(settings) == 1 else policy),
        )  # fmt: skip
    axes.set(xscale="log", xlabel="Tokens per rank in a pass", ylim=(_LEAST_GAIN, None))
    axes.set_xticks([one.tokens for one in ordered], [f"{one.tokens:,}" for one in ordered])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Throughput to that of static expert parallelism", loc="left")
    set_legend(figure, entries_of(axes))
    set_caption(figure, caption)
    return figure
