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


def test_every_system_and_experiment_is_in_the_readme() -> None:
    systems = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", section("Systems"), re.M)))
    assert set(discover("system")[0]) <= set(systems)
    experiments = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", section("Running experiments"), re.M)))
    assert set(experiments) == {path.stem for path in (CONF / "experiment").glob("*.yaml")}


def test_every_experiment_has_its_question_and_time() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", page, re.M)))
    assert sorted(listed) == sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in PAGES[1:]} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"
