"""One tiny execution of every kind of command that the pages show, in the order in which a reader types them.

Real ranks are started by the smoke test, torchrun and SLURM by tests/experiments/launch and tests/cluster.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.programs import Programs

_RUN = ("experiment=smoke", "backend=simulator", "hardware=dgx_h100", "router.skew=0,0.9", "wandb.mode=disabled")


@pytest.fixture(scope="module")
def results(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated sweep, run where the terminal takes ASCII only."""
    folder = tmp_path_factory.mktemp("results")
    done = programs.run("run.py", *_RUN, f"results_dir={folder}", variables={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.isascii()
    assert "\\u" not in done.stdout
    assert "report: " in done.stdout
    return folder


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("analysis.report.__main__ {results}", "{results}/report.html"),
        ("analysis.report.__main__ {run}", "{run}/report.html"),
        ("analysis.figures.__main__ {sweep}", "{sweep}/figures/skew_sweep.png"),
        ("analysis.summary {run}", "{run}/summary.json"),
        ("analysis.claims {results} --out {results}/claims", "{results}/claims/claims.csv"),
        ("scripts.slurm.collect {results}", "report: {sweep}/report.html"),
    ],
)
def test_it_does_what_the_pages_say(
    command: str, printed: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep,) = (path.parent for path in results.rglob("sweep.json"))
    run = sorted(path.parent for path in results.rglob("manifest.json"))[0]
    module, *arguments = command.format(results=results, run=run, sweep=sweep).split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    importlib.import_module(module).main()
    wanted = printed.format(results=results, run=run, sweep=sweep)
    assert wanted in capsys.readouterr().out.splitlines()
    assert Path(wanted.removeprefix("report: ")).stat().st_size > 0
