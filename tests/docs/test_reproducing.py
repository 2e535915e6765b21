import re
import shlex
from pathlib import Path

import pytest

from analysis.claims import claims
from experiments.compose.help import CONF
from experiments.routers.base import SkippedPoint
from tests.conftest import Load

PAGE = (CONF.parent / "docs" / "reproducing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python run\.py ((?:.*\\\n)*.*)$", PAGE, re.M)


def test_every_experiment_that_is_named_exists() -> None:
    known = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    named = set(re.findall(r"experiment=(\w+)", PAGE))
    assert named <= known
    assert {name for name in known if name.startswith("paper_")} <= named


@pytest.mark.many
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_every_command_is_a_valid_run(command: str, load: Load) -> None:
    """The first point of a sweep stands for all, with random weights: those of the hub are not on every machine."""
    overrides = [re.sub(r"^([^,\[]*),.*", r"\1", part) for part in shlex.split(command.replace("\\\n", " "))]
    try:
        point = load(*overrides, "model.random_weights=true")
    except SkippedPoint as reason:  # the authors' files are not on every machine either
        pytest.skip(str(reason))
    assert point.options.world_size == 8


def test_published_changes_are_those_of_the_claims(tmp_path: Path) -> None:
    frame = claims([tmp_path])
    (table,) = [part for part in PAGE.split("\n\n") if part.startswith("| claim, HarMoEny")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for claim, row in zip(("throughput", "ttft", "idle"), rows, strict=True):
        published = frame[(frame["claim"] == claim) & (frame["origin"] == "published")]
        assert re.findall(r"[+-]\d+(?= %)", row[2]) == [f"{change:+.0%}"[:-1] for change in published["change"]]
