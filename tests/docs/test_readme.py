from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.choices import CONF
from experiments.discovery import discover

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"
