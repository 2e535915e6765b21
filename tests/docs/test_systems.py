from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from experiments.registry import discover
from harmoeny.policy import Policy

SYSTEMS: dict[str, type[Policy]] = discover("system")[0]
TEXT = (Path(__file__).parents[2] / "docs" / "systems.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^## (\S.*)\n((?:(?!## ).*\n)*)", TEXT, re.MULTILINE))
COMMON = {f.name for f in fields(Policy)}


def test_common_options_are_described() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", SECTIONS["Options of all systems"], re.MULTILINE)) >= COMMON


@pytest.mark.parametrize("name", sorted(set(SYSTEMS) & set(SECTIONS)))
def test_every_section_names_the_options_of_its_system(name: str) -> None:
    own = {f.name for f in fields(SYSTEMS[name])} - COMMON
    missing = {option for option in own if f"`{option}`" not in SECTIONS[name]}
    assert not missing, f"docs/systems.md, section {name}: does not name {sorted(missing)}"
    for part in ("**Options.**", "**Costs.**", "**Source.**"):
        assert part in SECTIONS[name], f"docs/systems.md, section {name}: no {part}"


def test_no_section_describes_a_system_that_is_gone() -> None:
    unavailable = tuple(discover("system")[1])  # modules, each with systems that are called after it
    sections = {name for name in SECTIONS if not (unavailable and name.startswith(unavailable))}
    assert sections - {"Options of all systems"} <= set(SYSTEMS)
