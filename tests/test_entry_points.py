"""Commands print where the terminal is not UTF-8: what its encoding lacks is escaped, and nothing fails."""

from __future__ import annotations

import importlib
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from analysis.data.load import load_run
from analysis.report.reports import report_runs
from results_schema.printing import print_anything
from tests.conftest import ROOT
from tests.synthetic import write_run

#: Runs before any package is installed, and prints names and numbers.
_BEFORE_ALL = "scripts.lowest"
_GUARD = '__name__ == "__main__"'
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("analysis", "scripts")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
    if _GUARD in path.read_text(encoding="utf-8")
]
COMMANDS.remove(_BEFORE_ALL)


def ascii_stdout(monkeypatch: pytest.MonkeyPatch) -> BytesIO:
    """Let the standard output take ASCII only, as under PYTHONIOENCODING=ascii, and return what it writes to."""
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii", errors="strict", write_through=True))
    return written


def test_every_command_is_found() -> None:
    assert {"analysis.figures.__main__", "analysis.report.__main__", "scripts.calibrate"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_anything(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ascii_stdout(monkeypatch)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(command).main()
    print("é, ─, \udcff")
    assert written.getvalue().endswith(rb"\xe9, \u2500, \udcff" + b"\n")


def test_a_report_is_printed_with_lines_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "résultats"
    write_run(folder)
    written = ascii_stdout(monkeypatch)
    print_anything()
    report_runs([load_run(folder)], [{"router.skew": 0.9}], "skew_sweep", folder)
    printed = written.getvalue().decode("ascii")
    assert "-----" in printed
    assert "\\u2500" not in printed
    assert r"r\xe9sultats" in printed
    assert "─" in (folder / "table.txt").read_text(encoding="utf-8"), "the file is UTF-8 as ever"
