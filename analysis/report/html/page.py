"""Renders sections as one HTML page that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from analysis.present.serving_table import RATE, ServingTable, serving_frame, serving_table
from analysis.present.style import label, look
from analysis.report.html.comparison import Column, Group, columns_of, csv_link, groups_of
from analysis.report.html.headline import Headline, headline
from analysis.report.html.paper import Claim, claims_of
from analysis.report.html.plots import Plot, plots_of
from analysis.report.html.provenance import SystemCard, checks_of, config_text, differences, environment, systems_of
from analysis.report.html.section import Section
from analysis.report.html.warnings import Alert, warnings_of

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Note:
    """What is said above all sections: a line, and a list that can be opened."""

    text: str
    items: Sequence[str]


@dataclass(frozen=True)
class Content:
    """A section as the template shows it."""

    key: str
    section: Section
    headline: Headline
    warnings: list[Alert]
    caption: str
    plots: list[Plot]
    columns: list[Column]
    groups: list[Group]
    csv: str
    serving: ServingTable | None
    claims: list[Claim]
    systems: list[SystemCard]
    differences: list[tuple[str, list[str]]]
    configs: list[tuple[str, str]]
    environment: list[tuple[str, str]]
    checks: list[tuple[str, str, str, bool]]


def render_page(sections: Sequence[Section], title: str, created: str, notes: Sequence[Note] = ()) -> str:
    """Render the page.

    Args:
        sections: what it shows, at least one.
        title: of the page.
        created: when, and from what.
        notes: what is said above all sections.
    """
    contents = [_content(f"s{i}", section) for i, section in enumerate(sections)]
    scripts = [_plotly(), (_FOLDER / "report.js").read_text(encoding="utf-8")]
    return _template().render(
        title=title,
        figures=[(path.stem, _image(path)) for path in sections[0].figures] if len(sections) == 1 else [],
        created=created,
        notes=notes,
        contents=contents,
        style=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),  # noqa: S704  (ours)
        scripts=[Markup(script) for script in scripts],  # noqa: S704  (ours and Plotly's)
        script_hashes=[_hash(script) for script in scripts],
        plots=Markup(_json({c.key: [_for_browser(plot) for plot in c.plots] for c in contents})),  # noqa: S704
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label, "colour": lambda system: look(system).colour}
    return environment.get_template("report.html.j2")


def _content(key: str, section: Section) -> Content:
    """Gather all that the template shows of a section."""
    columns = columns_of(section.frame)
    names = [name or run.manifest["run_id"] for name, run in zip(section.labels, section.runs, strict=True)]
    return Content(
        key=key,
        section=section,
        headline=headline(section),
        warnings=warnings_of(section),
        caption=section.caption,
        plots=plots_of(section),
        columns=columns,
        groups=groups_of(section, columns),
        csv=csv_link(section.frame),
        serving=_serving(section),
        claims=claims_of(section),
        systems=systems_of(section),
        differences=differences(section),
        configs=[(name, config_text(run)) for name, run in zip(names, section.runs, strict=True)],
        environment=environment(section),
        checks=checks_of(section),
    )


def _serving(section: Section) -> ServingTable | None:
    """Return the table of the open loop; None where there is none."""
    axes = [axis for axis in section.axes if axis != RATE]
    frame = serving_frame(section.runs, section.points, axes)
    return None if frame.empty else serving_table(frame, axes, section.runs)


def _image(path: Path) -> str:
    """Return a PNG file as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _for_browser(plot: Plot) -> dict[str, Any]:
    variants = [{"figure": figure, "height": plot.height[name]} for name, figure in plot.variants.items()]
    return {"key": plot.key, "variants": variants}


@cache
def _plotly() -> str:
    """Return Plotly's script, which the page carries."""
    from plotly.offline import get_plotlyjs  # 0.3 s, for reports only

    script: str = get_plotlyjs().replace("\r\n", "\n")  # as the browser reads it, before it computes the hash
    assert "</script" not in script, "would end its element"
    return script


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element; NaN, which JSON has not, becomes null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Return plain data for JSON; what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    return value.item() if hasattr(value, "item") else value
