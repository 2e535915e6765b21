"""Reads the tables of docs/metrics.md, for tests that hold them against the code."""

from __future__ import annotations

import re
from pathlib import Path

_TEXT = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table under the heading that begins so, without its header."""
    (section,) = [part for part in re.split(r"^## ", _TEXT, flags=re.MULTILINE) if part.startswith(heading)]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(heading: str) -> list[str]:
    """Return the names in the first column of a table; a cell may hold several."""
    return [name for row in table(heading) for name in re.findall(r"`([^`]+)`", row[0])]


def names_in(heading: str, first_cell: str) -> list[str]:
    """Return the names that the definition in one row of a table mentions."""
    (row,) = [row for row in table(heading) if row[0] == first_cell]
    return re.findall(r"`([^`]+)`", row[-1])
