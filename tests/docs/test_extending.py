"""The worked examples of docs/extending.md work: the policy keeps what every policy must, in the real runtime too."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.data.load import Run, load_run
from analysis.figures.kit.base import draw_all, figure_data
from analysis.report.html.write import write_report
from experiments.compose.help import CONF
from harmoeny.placement import place
from tests.docs.commands import commands, overrides, program
from tests.harmoeny.runtime.cases import random_tokens
from tests.harmoeny.runtime.layer.test_engine import run_layers
from tests.programs import Programs
from tests.synthetic import write_run

PAGE = CONF.parent / "docs" / "extending.md"


def example(file: str) -> ModuleType:
    """Execute the example that the page says to save under a name."""
    text = PAGE.read_text(encoding="utf-8")
    code = text.split(f"`{file}`:\n\n```python\n", 1)[1].split("```", 1)[0]
    module = ModuleType(f"{Path(file).stem}_of_the_docs")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def scatter() -> Any:
    module = example("baselines/scatter.py")
    yield module.__dict__["Scatter"]
    del sys.modules[module.__name__]


def test_it_plans_what_its_docstring_says(scatter: Any) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (4, 6))
    placement = place("contiguous", 6, 4)
    plan = scatter(stride=3).plan(counts, placement)
    plan.validate(counts, placement)
    for expert in range(6):
        assert (plan.tokens[:, expert, expert * 3 % 4] == counts[:, expert]).all()


def test_it_refuses_what_it_cannot_do(scatter: Any) -> None:
    with pytest.raises(ValueError, match="stride: 0, must be at least 1"):
        scatter(stride=0).validate()


def test_it_is_exact_in_the_runtime(scatter: Any) -> None:
    tokens = [[random_tokens(rank, 12, 6, 2) for rank in range(3)] for _ in range(2)]
    run_layers(3, scatter(), tokens, num_experts=6)


def saved_examples() -> dict[str, str]:
    """Return all examples of the page by the file that it says to save them as."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"`([\w/]+\.(?:py|yaml))`[^`]*?:\n\n```(?:python|yaml)\n(.*?)```", text, re.S))


def test_every_example_is_read() -> None:
    assert len(saved_examples()) == PAGE.read_text(encoding="utf-8").count("```") / 2 == 6


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which all examples were saved as the page says."""
    root = tmp_path_factory.mktemp("extended")
    for folder in (
        "analysis", "baselines", "conf", "experiments", "harmoeny", "hydra_plugins", "results_schema",
        "results/published",
    ):  # fmt: skip
        shutil.copytree(CONF.parent / folder, root / folder)  # with what is compiled, which times of files keep valid
    for file in ("run.py", "pyproject.toml"):
        shutil.copy(CONF.parent / file, root)
    for file, code in saved_examples().items():  # a reader may have saved them in the project, too
        (root / file).write_text(code, encoding="utf-8")
    return root


def write_mail(root: Path) -> Path:
    """Write some messages for the worked data set."""
    mail = root / "mail"
    mail.mkdir(exist_ok=True)
    for i in range(3):
        body = f"Message {i}: " + "the experts of this layer are where the tokens go. " * 40
        (mail / f"{i}.eml").write_text(f"From: a@b\nSubject: {i}\n\n{body}\n", encoding="utf-8")
    return mail


def run_words(root: Path) -> list[str]:
    """Return a command line with every example but the machine."""
    return [
        "run.py", "router=camps", "router.loyalty=0.8", "dataset=mail", f"dataset.path={write_mail(root)}",
        "model=sigmoid_stack", "model.top_k=2", "system=[static_ep,scatter,drop]", "systems.scatter.stride=3",
        "batch_size=2", "seq_len=32", "rounds=2", "wandb.mode=disabled", f"results_dir={root / 'out'}",
    ]  # fmt: skip


def finished(root: Path, done: subprocess.CompletedProcess[str]) -> Run:
    """Return the run that a command made."""
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = (root / "out").rglob("manifest.json")
    run = load_run(manifest.parent)
    shutil.rmtree(root / "out")
    return run


@pytest.mark.ranks
def test_saved_as_the_page_says_all_examples_run_together_on_real_ranks(programs: Programs, extended: Path) -> None:
    words = run_words(extended)
    run = finished(extended, programs.run(*words, cwd=extended, variables={"PYTHONPATH": str(extended)}, timeout_s=110))
    assert run.manifest["model"]["name"] == "sigmoid_stack"
    assert {name: check["passed"] for name, check in run.manifest["checks"].items()} == {
        "static_ep": True, "scatter": True, "drop": True,
    }  # fmt: skip
    # 64 tokens of each rank meet the rank's own expert, 0 or 1, and no token meets one twice: their second assignments
    # are spread over the seven others.
    layers = run.layers[run.layers["round"] == 0].set_index(["system", "rank"])
    preferred, other = 64 + 64 / 7, 2 * 64 / 7
    assert layers.loc[("static_ep", 0), "executed_tokens"] == pytest.approx(2 * preferred + 2 * other, abs=4)
    # scatter executes expert 1 on rank 1 (1 * 3 modulo 2).
    assert layers.loc[("scatter", 0), "executed_tokens"] == pytest.approx(128, abs=4)
    assert layers.loc[("scatter", 1), "num_host_fetches"] != 0


def own_commands() -> list[str]:
    """The page's runs of what it says to save."""
    names = {name for file in saved_examples() for name in [Path(file).stem]}
    return [c for c in commands(PAGE) if program(c) == "run.py" and names & set(re.findall(r"\w+", c))]


@pytest.mark.parametrize("command", own_commands())
def test_every_command_of_the_page_runs_as_it_stands(command: str, programs: Programs, extended: Path) -> None:
    """It is checked at all points, without running them: that test is above."""
    write_mail(extended)
    words = [word.replace("=FOLDER", "=mail") for word in overrides(command)]
    done = programs.run(
        "run.py", *words, "dry_run=true", f"results_dir={extended / 'out'}",
        cwd=extended, variables={"PYTHONPATH": str(extended)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " to run" in done.stdout
    assert ("router.skew: not swept" in done.stderr) == ("router=camps" in command)


def test_the_commands_are_found() -> None:
    assert len(own_commands()) == 5


def test_the_written_down_cluster_is_simulated(programs: Programs, extended: Path) -> None:
    cluster = ("backend=simulator", "hardware=my_cluster", "world_size=16", "model.num_experts=32")
    words = (*run_words(extended), *cluster)
    run = finished(extended, programs.run(*words, cwd=extended, variables={"PYTHONPATH": str(extended)}))
    assert set(run.layers["device"]) == {"my_cluster"}
    assert set(run.layers["rank"]) == set(range(16))


@pytest.mark.programs
def test_the_examples_are_as_clean_as_the_project(extended: Path) -> None:
    files = [file for file in saved_examples() if file.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=extended, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_worked_figure_is_drawn_like_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = example("analysis/figures/hidden_fetches.py")
    run = load_run(write_run(tmp_path / "run").folder)
    monkeypatch.setattr("analysis.figures.kit.base.discover", lambda: [figure])
    data = figure_data([run], [{}])
    (drawn,), lacking = draw_all(data, tmp_path)
    assert (drawn.name, lacking) == ("hidden_fetches.png", {})
    (page,) = [write_report(run.folder).read_text(encoding="utf-8") for _ in draw_all(data, run.folder / "figures")[0]]
    assert "Figures to print (hidden_fetches)" in page
    assert base64.b64encode((run.folder / "figures" / "hidden_fetches.png").read_bytes()).decode() in page
    shares = pd.read_csv(drawn.with_suffix(".csv")).set_index("system")["fetch_hidden_share"]
    for system in run.systems:
        rows = run.layers[run.layers["system"] == system].groupby("round")[["fetch_wait_s", "fetch_s"]].sum()
        hidden = [
            1 - wait / fetch if fetch else 1.0
            for wait, fetch in zip(rows["fetch_wait_s"], rows["fetch_s"], strict=True)
        ]
        assert shares[system] == pytest.approx(np.median(hidden))
    assert figure.missing(figure_data([run, run], [{}, {}])) == (
        "needs one run with fetches: python run.py experiment=prefetch_ablation"
    )
