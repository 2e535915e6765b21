"""The list of planted defects fits the code; `python -m scripts.planted` itself takes minutes."""

from __future__ import annotations

from pathlib import Path

from scripts.planted import DEFECTS, ROOT, stale


def test_every_defect_has_its_place_and_a_test_file() -> None:
    assert stale() == []
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    assert all((ROOT / defect.tests.partition("::")[0]).is_file() for defect in DEFECTS)


def test_the_page_names_every_defect() -> None:
    page = Path(ROOT, "docs", "trust.md").read_text(encoding="utf-8")
    assert [defect.name for defect in DEFECTS if f"| {defect.name} |" not in page] == []
