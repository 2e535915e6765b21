"""Runs the parts of a check one after another, and says what they gave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from results_schema.atomic import write_text
from scripts.gpu_check.packages import ROOT
from scripts.gpu_check.parts import Part, Row

_STOP_S = 10
_LAST_LINES = 3


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: the part.
        status: ``done``, ``failed``, ``stopped`` (at its limit) or ``no time left``.
        taken_s: how long it ran.
        rows: what was measured.
    """

    part: Part
    status: str
    taken_s: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether it ended well and every goal was met."""
        return self.status == "done" and all(row.met is not False for row in self.rows)


def run_part(part: Part, out: Path, limit_s: float) -> Outcome:
    """Run one part in a process group of its own, which is ended with it, and read its results.

    Args:
        part: what to run.
        out: folder for its log and results.
        limit_s: it is stopped after that.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (out.parent / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603  (our own commands)
            part.command(out), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "done" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:
            _end(process)
    rows = []
    try:
        rows = part.rows(out)
    except (OSError, ValueError, KeyError, SyntaxError) as error:  # SyntaxError: of XML
        status = "failed" if status == "done" else status
        rows = [Row(part.what, f"no results: {error}", "", None)]
    return Outcome(part, status, time.monotonic() - start, rows)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt what is left of a part's processes, and kill them if that does not help."""
    for how in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            if how == signal.SIGINT:
                time.sleep(0.2)  # its children end with it


def check(parts: Sequence[Part], out: Path, minutes: float, machine: dict[str, Any], console: Console) -> list[Outcome]:
    """Run the parts while there is time, and write and print what they gave.

    Args:
        parts: the longest first.
        out: folder for all results.
        minutes: for all of them together.
        machine: what it runs on.
        console: for progress and the table.
    """
    end = time.monotonic() + 60 * minutes
    write_text(out / "machine.json", json.dumps(machine, indent=2) + "\n")
    outcomes: list[Outcome] = []
    for part in parts:
        left_s = end - time.monotonic()
        if left_s < 1:
            outcomes.append(Outcome(part, "no time left"))
            continue
        limit_s = min(part.limit_s, left_s)
        console.print(f"{part.name}: {part.what}, at most {limit_s:.0f} s")
        outcomes.append(run_part(part, out / part.name, limit_s))
        if outcomes[-1].status != "done":
            log = out / f"{part.name}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            console.print(escape(f"  {outcomes[-1].status} ({log}): " + " | ".join(lines)), soft_wrap=True)
        write_text(out / "table.md", markdown(outcomes, machine))
    console.print(_table(outcomes, machine))
    return outcomes


def markdown(outcomes: Sequence[Outcome], machine: dict[str, Any]) -> str:
    """Return the table as a page."""
    lines = [
        f"# {machine['title']}",
        "",
        *(f"- {key}: {value}" for key, value in machine.items() if key != "title"),
        "",
    ]
    lines += ["| part | measured | value | goal | reached |", "| --- | --- | --- | --- | --- |"]
    lines += [
        "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
        for cells in _cells(outcomes)
    ]
    return "\n".join(lines) + "\n"


def _cells(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    said = {None: "", True: "yes", False: "no"}
    cells: list[tuple[str, ...]] = []
    for outcome in outcomes:
        name = f"{outcome.part.name}, {outcome.taken_s:.0f} s"
        for row in outcome.rows or [Row(outcome.part.what, "")]:
            met = said[row.met] if outcome.status == "done" else outcome.status
            cells.append((name, row.what, row.value, row.goal, met))
    return cells


def _table(outcomes: Sequence[Outcome], machine: dict[str, Any]) -> Table:
    table = Table(title=machine["title"], caption=f"{machine['device']}, PyTorch {machine['torch']}")
    for column in ("part", "measured", "value", "goal", "reached"):
        table.add_column(column)
    for cells in _cells(outcomes):
        table.add_row(*(escape(cell) for cell in cells))
    return table
