"""Set-up, CI and packaging: what a newcomer meets first."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    """A PATH whose only Pythons answer as Python 3.9 would."""
    for name in ("python3.11", "python3"):
        stub = tmp_path / name
        stub.write_text("#!/bin/sh\nexit 1\n")
        stub.chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


@pytest.mark.programs
def test_make_alone_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    listed = [line.split()[0] for line in make().stdout.splitlines()]
    assert sorted(listed) == sorted(targets[1].split())


@pytest.mark.programs
def test_demo_is_the_main_experiment_and_ci_runs_every_check() -> None:
    assert "python run.py experiment=skew_sweep" in make("-n", "demo").stdout
    checks = make("-n", "test").stdout
    for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert f"/{tool}" in checks or f"-m {tool}" in checks
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.programs
@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_an_old_python_is_refused_in_one_line(target: str, old_python: str, tmp_path: Path) -> None:
    answer = make(target, f"VENV={tmp_path / 'venv'}", PATH=old_python)
    assert answer.returncode != 0
    assert answer.stdout.splitlines() == [
        "error: Python 3.11 or newer is needed, as python3.11 or python3, or PYTHON=/its/path"
    ]
    assert not (tmp_path / "venv").exists()


@pytest.mark.programs
def test_an_installed_environment_is_kept_until_the_dependencies_change(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    torch = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    stamp = venv / f"installed-torch-{torch[1]}"
    stamp.touch()
    assert "pip install" not in make("-n", "demo", f"VENV={venv}").stdout
    assert "pip install" in make("-n", "demo", f"VENV={venv}", "TORCH=2.9.1").stdout
    os.utime(stamp, (0, 0))
    assert "pip install" in make("-n", "demo", f"VENV={venv}").stdout, "pyproject.toml is newer"


def test_the_default_torch_is_one_that_the_project_accepts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    default = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default is not None
    assert torch.specifier.contains(default[1])
