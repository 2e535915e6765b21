"""Every command that the pages show works: runs are checked at all points, modules know the options."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from experiments.compose.swept import leave_out_absent, sweep_points
from experiments.routers.base import SkippedPoint
from tests.conftest import Compose
from tests.docs.commands import PAGES, ROOT, commands, overrides, program
from tests.harmoeny.models.saved import save
from tests.programs import Programs
from tests.strategies import few_points

#: Pages whose commands use what the reader saved before; tests/docs/test_extending.py runs those in a copy that has it.
_EXAMPLES = ("scatter", "camps", "mail", "sigmoid_stack", "my_cluster")
SHOWN = [
    (page, command)
    for page in PAGES
    for command in commands(page)
    if not set(_EXAMPLES) & set(re.findall(r"\w+", command))
]
ALL = list(dict.fromkeys(command for _, command in SHOWN))
#: As in `python run.py ...`: a command in general, not one to type.
RUNS = [c for c in ALL if program(c) == "run.py" and not re.search(r"\.\.\.|NAME|--help|run\.py$", c)]
MODULES = [c for c in ALL if " -m " in c and program(c) not in ("pip", "pytest")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the pages' placeholders stand for: a text, and saved models."""
    folder = tmp_path_factory.mktemp("placeholders")
    (folder / "text.txt").write_text("The experts of this layer are where the tokens go. " * 500, encoding="utf-8")
    return {
        "dataset.path": folder / "text.txt",
        **{name: save(name, folder, vocab_size=512, max_position_embeddings=512) for name in ("qwen3_moe", "mixtral")},
    }


def as_typed(command: str, saved: dict[str, Path]) -> list[str]:
    """Return the overrides of a command with its placeholders filled in, for a machine without weights of the hub."""
    model = saved["mixtral" if "mixtral" in command else "qwen3_moe"]
    words = [w.replace("dataset.path=FILE", f"dataset.path={saved['dataset.path']}") for w in overrides(command)]
    words = [w.replace("model.local_path=FOLDER", f"model.local_path={model}") for w in words]
    words = [
        w.replace("hardware=this_machine", "hardware=cpu_core") for w in words
    ]  # what scripts.calibrate would write
    # Only a GPU can be shared, and not every machine that runs this has one.
    words = [w for w in words if not w.startswith(("ranks_per_gpu=", "gpu_sharing="))]
    ranks = re.search(r"--nnodes (\d+)", command), re.search(r"--nproc-per-node (\d+)", command)
    if ranks[1]:
        words.append(f"world_size={int(ranks[1][1]) * (int(ranks[0][1]) if ranks[0] else 1)}")
    words += [] if "hydra/launcher=slurm" in words else ["device=cpu"]
    return words


def check_run(words: list[str], compose: Compose, tmp_path: Path) -> None:
    """Compose all points as run.py does, and check them."""
    words = [f"results_dir={tmp_path}", *words]
    config = compose(*words, multirun=True)
    if config.model.get("hub_name") and not config.model.get("local_path"):
        config = compose(*words, "model.random_weights=true", multirun=True)
    leave_out_absent(config)
    few_points(config)
    try:
        points, _ = sweep_points(config)
    except SkippedPoint:
        return
    assert points


@pytest.mark.many
@pytest.mark.parametrize("command", RUNS)
def test_every_run_is_valid_at_all_its_points(
    command: str, compose: Compose, saved: dict[str, Path], tmp_path: Path
) -> None:
    assert not re.findall(r"=[A-Z]{3,}", " ".join(overrides(command)).replace("=FILE", "").replace("=FOLDER", ""))
    check_run(as_typed(command, saved), compose, tmp_path)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", MODULES)
def test_every_module_has_the_options_that_are_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported most of what the modules need; the next test starts each by itself."""
    words = shlex.split(command.replace("<", "").replace(">", ""))
    given = words[words.index("-m") + 2 :]
    monkeypatch.setattr(sys, "argv", ["", *given, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(program(command), run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    assert not ended.value.code
    assert said.startswith("usage: ")
    for option in re.findall(r"--[\w-]+", command):
        assert re.search(rf"{option}\b", said), f"{option} is not in --help"


@pytest.mark.parametrize("module", sorted({program(command) for command in MODULES}))
def test_every_module_starts_by_itself(module: str, programs: Programs) -> None:
    done = programs.run("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("make ")])
def test_every_target_exists(command: str) -> None:
    target = shlex.split(command.replace("<", "").replace(">", ""))[1]
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("command", [c for c in ALL if "pip install" in c])
def test_every_extra_exists(command: str) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r"\.\[(\w+)\]", command)
    assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("sbatch ")])
def test_every_script_exists(command: str) -> None:
    (script,) = re.findall(r"\S+\.sbatch", command)
    assert (ROOT / script).is_file()


def test_no_command_is_left_out() -> None:
    checked = (*RUNS, *MODULES, *(c for c in ALL if re.match("make |sbatch ", c) or "pip install" in c))
    general = [c for c in ALL if c not in checked]
    assert all(re.search(r"\.\.\.|NAME|--help|run\.py$", c) for c in general), general
    assert len(RUNS) > 25
