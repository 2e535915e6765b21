"""Writes the advice of a sweep: one page as HTML and Markdown, the gains as CSV, and a figure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.advice.document import Document
from analysis.advice.error import FOLDER
from analysis.advice.margin import margin_of
from analysis.advice.page import document
from analysis.advice.points import WHAT_IF, Points
from analysis.advice.serving import Served, has_rates, serving_document
from analysis.data.load import Sweep
from results_schema.atomic import write_text

HTML, MARKDOWN, CSV = "advice.html", "advice.md", "advice.csv"


def write_advice(sweep: Sweep, validation: Path = FOLDER) -> Document:
    """Write the advice of a sweep into its folder.

    Args:
        sweep: with static expert parallelism in every run.
        validation: where the simulator's validation is.

    Returns:
        The page.

    Raises:
        ValueError: no run is finished, or one lacks what advice is made of.
    """
    if not sweep.runs:
        raise ValueError(f"{sweep.folder}: no finished run to advise on; start the same command again")
    margin = margin_of(sweep.runs, validation)
    if all(has_rates(run) for run in sweep.runs):
        served = Served.of(sweep, margin)
        page, rows = serving_document(served, sweep.folder), _rate_rows(served)
    else:
        points = Points.of(sweep, margin)
        page, rows = document(points, sweep.folder), _gain_rows(points)
    write_text(sweep.folder / CSV, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    write_text(sweep.folder / MARKDOWN, page.markdown())
    write_text(sweep.folder / HTML, page.html())
    return page


def _gain_rows(points: Points) -> list[dict[str, Any]]:
    return [
        {"tokens_per_rank": one.tokens, "spare_slots": one.spare_slots, WHAT_IF: one.what_if} | asdict(gain)
        for one in points.verdicts
        for gain in one.gains
    ]


def _rate_rows(served: Served) -> list[dict[str, Any]]:
    return [
        {WHAT_IF: verdict.what_if} | {name: value for name, value in asdict(one).items() if name != "failing"}
        for verdict in served.verdicts
        for one in [verdict.static, *verdict.others]
    ]
