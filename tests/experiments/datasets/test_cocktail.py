"""A mix of texts, and which parts it may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.datasets.cocktail import Cocktail


class TestCocktail:
    def test_one_document_of_each_in_turn(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a1\n\na2\n\na3")
        (tmp_path / "b").write_text("b1")
        data = Cocktail(parts=[str(tmp_path / "a"), str(tmp_path / "b")])
        data.validate()
        assert list(data.documents()) == ["a1", "b1", "a2", "a3"]

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([], r"dataset\.parts: \[\], must name some of bookcorpus"),
            ([[]], r"dataset\.parts: \[\], must be one of"),
            (["no"], r"dataset\.parts: 'no', must be one of"),
        ],
    )
    def test_parts_are_checked(self, parts: list[Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            Cocktail(parts=parts).validate()
