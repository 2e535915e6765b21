"""A page as plain blocks, written as Markdown and as HTML that fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_FOLDER = Path(__file__).parent
_STYLE = _FOLDER.parent / "report" / "html" / "report.css"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names its rows. ``strong`` has the places (row, column) that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows."""

    path: Path
    text: str


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs before all else.
        bullets: a list.
        table: a table.
        picture: a picture.
        code: a command.
        notes: small print below.
    """

    title: str
    text: Sequence[str] = ()
    bullets: Sequence[str] = ()
    table: Table | None = None
    picture: Picture | None = None
    code: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Document:
    """A page.

    Attributes:
        title: its heading.
        badges: what the numbers are, in a few words each; the first one stands out.
        lead: what to do, in a few lines.
        bullets: what else to know first.
        parts: the rest.
    """

    title: str
    badges: Sequence[str]
    lead: Sequence[str]
    bullets: Sequence[str]
    parts: Sequence[Part] = field(default_factory=list)

    def markdown(self) -> str:
        """Return it as Markdown; pictures are links to files beside it."""
        lines = [f"# {self.title}", "", " | ".join(self.badges), ""]
        lines += [line for text in self.lead for line in (f"**{text}**", "")]
        lines += _list(self.bullets)
        for part in self.parts:
            lines += [f"## {part.title}", ""]
            lines += [line for text in part.text for line in (text, "")]
            lines += _list(part.bullets)
            if part.picture is not None:
                lines += [f"![{part.picture.text}](figures/{part.picture.path.name})", ""]
            if part.table is not None:
                lines += [*_markdown_table(part.table), ""]
            if part.code:
                lines += [*(f"    {line}" for line in part.code.splitlines()), ""]
            lines += [line for text in part.notes for line in (text, "")]
        return "\n".join(lines).rstrip() + "\n"

    def html(self) -> str:
        """Return it as one HTML file with its pictures in it."""
        environment = Environment(
            loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        images = {
            part.picture.path: "data:image/png;base64," + base64.b64encode(part.picture.path.read_bytes()).decode()
            for part in self.parts
            if part.picture is not None
        }
        style = Markup(_STYLE.read_text(encoding="utf-8"))  # noqa: S704  (ours)
        return environment.get_template("advice.html.j2").render(page=self, style=style, images=images)


def _list(items: Sequence[str]) -> list[str]:
    return [*(f"- {item}" for item in items), ""] if items else []


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    rows = [
        [f"**{cell}**" if (r, c) in table.strong and cell else cell for c, cell in enumerate(row)]
        for r, row in enumerate(table.rows)
    ]
    return [line(table.head), line(["---"] * len(table.head)), *map(line, rows)]
