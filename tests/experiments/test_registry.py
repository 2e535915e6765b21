import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import baselines
from experiments.compose.help import help_text
from experiments.compose.load import load_point
from experiments.compose.schema import register_options
from experiments.registry import GROUPS, discover
from harmoeny.policy import Policy
from tests.conftest import Compose

POLICY = """
from dataclasses import dataclass
from typing import ClassVar

from baselines.static_ep import StaticEP


@dataclass(kw_only=True)
class Newcomer(StaticEP):
    name: ClassVar[str] = "newcomer"
    description: ClassVar[str] = "written by a newcomer"

    patience: int = 3
"""

Drop = Callable[[str, str], object]


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    """Put a module into the package of baselines, by a second folder on its path; all is undone afterwards."""
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    ConfigStore.instance().repo.get("system", {}).pop("newcomer.yaml", None)
    for name in set(sys.modules) - before:
        if name.startswith("baselines."):
            del sys.modules[name]
            monkeypatch.delattr(baselines, name.removeprefix("baselines."), raising=False)


def test_a_new_file_is_a_choice_with_its_fields_as_options(drop: Drop, compose: Compose, tmp_path: Path) -> None:
    drop("newcomer", POLICY)
    register_options()
    overrides = ["system=[static_ep,newcomer]", "systems.newcomer.patience=7", f"results_dir={tmp_path}"]
    policy = load_point(compose(*overrides)).systems["newcomer"]
    assert isinstance(policy, Policy)
    assert type(policy).__module__ == "baselines.newcomer"
    assert vars(policy)["patience"] == 7
    assert vars(policy)["fetch"] == "async"  # inherited, with its default
    assert "newcomer         written by a newcomer" in help_text()


def test_a_missing_dependency_makes_one_choice_unavailable_and_breaks_nothing(drop: Drop) -> None:
    everything, missing = discover("system")
    drop("needy", "import a_library_that_nobody_has\n" + POLICY)
    found, unavailable = discover("system")
    assert found == everything
    assert unavailable == missing | {"needy": "No module named 'a_library_that_nobody_has'"}
    assert "needy            unavailable here: No module named 'a_library_that_nobody_has'" in help_text()


@pytest.mark.parametrize(
    ("text", "error"),
    [("1 / 0", ZeroDivisionError), ("def (", SyntaxError), ("raise RuntimeError('x')", RuntimeError)],
)
def test_other_errors_are_not_swallowed(text: str, error: type[Exception], drop: Drop) -> None:
    drop("broken", text)
    with pytest.raises(error):
        discover("system")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # It inherits being a dataclass, but its own field would be no option.
        (
            "@dataclass(kw_only=True)\n",
            "",
            r"^baselines\.newcomer\.Newcomer must be a dataclass with a name and a desc",
        ),
        ('"newcomer"', '""', r"^baselines\.newcomer\.Newcomer must be a dataclass with a name and a description$"),
        ('"written by a newcomer"', '""', r"^baselines\.newcomer\.Newcomer must be a dataclass with a name and a desc"),
        ('"newcomer"', '"drop"', r"^system 'drop' is defined twice: .*baselines\.drop\.Drop.*baselines\.newcomer"),
    ],
)
def test_components_that_break_the_rules_are_named(old: str, new: str, message: str, drop: Drop) -> None:
    drop("newcomer", POLICY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        discover("system")


def test_abstract_and_imported_classes_are_no_choices(drop: Drop) -> None:
    everything = discover("system")
    drop("helpers", "from baselines.drop import Drop\nfrom harmoeny.policy import Policy\nclass Base(Policy): pass\n")
    assert discover("system") == everything


@pytest.mark.parametrize("group", GROUPS)
def test_all_components_have_a_line_of_help(group: str) -> None:
    found, unavailable = discover(group)
    assert found
    assert set(unavailable) <= {"deepspeed_moe"}
    for name, cls in found.items():
        assert cls.name == name
        assert "\n" not in cls.description
        assert len(cls.description) < 100
