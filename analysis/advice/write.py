"""Writes the advice of a sweep: one page as HTML and Markdown, the gains as CSV, and a figure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from analysis.advice.document import Document
from analysis.advice.error import FOLDER, validated_error
from analysis.advice.page import document
from analysis.advice.points import WHAT_IF, Points
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
    points = Points.of(sweep, validated_error(str(sweep.runs[0].manifest["device"]), validation))
    page = document(points, sweep.folder)
    rows = [
        {"tokens_per_rank": one.tokens, "spare_slots": one.spare_slots, WHAT_IF: one.what_if} | asdict(gain)
        for one in points.verdicts
        for gain in one.gains
    ]
    write_text(sweep.folder / CSV, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    write_text(sweep.folder / MARKDOWN, page.markdown())
    write_text(sweep.folder / HTML, page.html())
    return page
