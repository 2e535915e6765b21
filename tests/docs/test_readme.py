from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.compose.help import CONF
from experiments.registry import discover

ROOT = CONF.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def named(table: str) -> set[str]:
    """Return the names in the first column of a table."""
    return set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M))))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_systems_of_the_readme_exist_and_have_a_section() -> None:
    """A system that was added is no fault here; one that is listed on one of the pages has to be on both."""
    systems = named(section("Systems"))
    found, unavailable = discover("system")
    assert {name for name in systems - set(found) if not name.startswith(tuple(unavailable) or ("-",))} == set()
    sections = set(re.findall(r"^## (\w+)$", page("systems.md"), re.M))
    assert systems == sections
    assert {"harmoeny", "static_ep", "eplb", "ideal"} <= systems


def test_experiments_of_the_readme_exist_and_have_their_time() -> None:
    experiments = named(section("Running experiments"))
    assert experiments <= {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert experiments == named(page("experiments.md"))
    assert "skew_sweep" in experiments


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in PAGES[1:]} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"
