"""``results.html``: one page with all sweeps and single runs in a folder, each with a link to its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.results.catalogue import Entry
from results_schema.atomic import write_text

NAME = "results.html"
_FOLDER = Path(__file__).parent
_STYLE = _FOLDER.parent / "report" / "html" / "report.css"
#: Pages that an entry may have, the first one first.
_PAGES = ("advice.html", "report.html")


def write_index(entries: Sequence[Entry], folder: Path) -> Path:
    """Write the page into a folder and return it.

    Args:
        entries: what is in it.
        folder: links are relative to it.
    """
    rows = [
        {
            "entry": entry,
            "name": _relative(entry.folder, folder),
            "pages": [
                (p.removesuffix(".html"), f"{_relative(entry.folder, folder)}/{p}")
                for p in _PAGES
                if (entry.folder / p).exists()
            ],
        }
        for entry in entries
    ]
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = Markup(_STYLE.read_text(encoding="utf-8"))  # noqa: S704  (ours)
    created = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by python -m analysis.results index."
    target = folder / NAME
    write_text(target, environment.get_template("index.html.j2").render(rows=rows, style=style, created=created))
    return target


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
