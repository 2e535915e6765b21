"""Everything that is drawn has a look of its own, the same everywhere."""

from __future__ import annotations

import re

from analysis.data.breakdown import PARTS
from analysis.present.style import _LOOKS, _OTHERS, PHASE_COLOURS, dataset_look, label, look
from experiments.registry import discover as discover_components


class TestStyle:
    def test_no_two_systems_look_the_same(self) -> None:
        looks = [*_LOOKS.values(), *_OTHERS]
        assert len(set(looks)) == len(looks)
        assert len({entry.colour for entry in looks}) == len(looks)

    def test_every_part_of_a_layer_has_its_own_colour(self) -> None:
        assert set(PHASE_COLOURS) == set(PARTS)
        assert len(set(PHASE_COLOURS.values())) == len(PHASE_COLOURS)

    def test_systems_here_are_told_apart(self) -> None:
        systems = set(_LOOKS) & set(discover_components("system")[0])  # those that users add get a look by their name
        assert len(systems) > 8
        assert len({look(name) for name in systems}) == len({label(name) for name in systems}) == len(systems)

    def test_a_newcomer_keeps_its_look(self) -> None:
        assert look("newcomer") == look("newcomer")
        assert look("newcomer") in _OTHERS
        assert label("newcomer") == "newcomer"


def test_variants_and_data_sets_have_looks_of_their_own() -> None:
    names = [f"harmoeny_threshold_{n}" for n in (1, 8, 32, 128, 512)]
    assert len({look(name) for name in (*names, "harmoeny")}) == 6
    assert all(re.fullmatch(r"#[0-9A-F]{6}", look(name).colour) for name in names)
    known = ["pydoc", "constant", "skewed_tokens", "random"]
    assert len({dataset_look(name) for name in known}) == len(known)
    assert dataset_look("a newcomer") == dataset_look("a newcomer")
