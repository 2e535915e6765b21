"""Some hundred of the fuzzed configurations; `python -m scripts.fuzz` has 10,000."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from scripts.fuzz import Composer, Configuration, Generator, fuzz
from tests.strategies import share_of


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    GlobalHydra.instance().clear()


@pytest.mark.many
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_every_configuration_is_a_point_or_an_error_of_one_line(first: int, tmp_path: Path) -> None:
    results = tmp_path / "results"
    seeds = range(first, first + share_of(25))
    wrong = [f"{seed}: {what}\n{problem}" for seed, what, problem in fuzz(seeds, results) if problem]
    assert wrong == []
    assert [path for path in results.rglob("*") if path.is_file()] == [], "nothing was measured"


def test_the_same_seed_draws_the_same() -> None:
    assert Generator().draw(5) == Generator().draw(5)
    generator = Generator()
    assert len({generator.draw(seed) for seed in range(50)}) > 45


@pytest.mark.parametrize(
    ("raised", "problem"),
    [
        (ValueError("rounds: two\nlines"), None),
        (ValueError("something is wrong"), "names nothing that was set"),
        (ValueError("rounds: " + "x" * 13_000), "a line of"),
        (KeyError("rounds"), "Traceback"),
    ],
)
def test_wrong_answers_are_noticed(
    raised: Exception, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise raised

    monkeypatch.setattr("experiments.compose.load.check_point", refuse)
    composer = Composer(tmp_path)
    from hydra import initialize_config_dir

    from experiments.compose.help import CONF
    from experiments.compose.schema import register_options

    register_options()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = composer.problem(Configuration(("rounds=3",), multirun=False))
    assert found is None if problem is None else found is not None and problem in found
