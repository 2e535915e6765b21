"""Runs everything that only a GPU can show, in the minutes that there are: the longest part first, each with its limit.

Results are written as they come: RESULTS/PART.log and what the part itself writes, then machine.json and table.md with
what was reached. It runs from a checkout; --list also names the packages that are missing here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from results_schema.atomic import write_text
from results_schema.printing import print_anything
from scripts.gpu_check.machine import ROOT, describe_machine, missing_packages
from scripts.gpu_check.parts import Part, Row, all_parts

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; 0 if every part ended and reached its goals."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=7, help="for everything together (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/gpu/DATE_TIME)")
    parser.add_argument("--only", metavar="PART,...", default="", help="run just these parts")
    parser.add_argument("--list", action="store_true", help="list the parts and what is missing here, and end")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on this CPU: shows that the check itself works"
    )
    given = parser.parse_args(arguments)
    device_type = "cpu" if given.rehearse else "cuda"
    parts = {part.name: part for part in all_parts(device_type, rehearsal=given.rehearse)}
    only = [name for name in given.only.split(",") if name]
    for name in only:
        if name not in parts:
            parser.error(f"--only: {name!r}, must be among {', '.join(parts)}")
    if not given.minutes > 0:
        parser.error(f"--minutes: {given.minutes:g}, must be above 0")
    console = Console(soft_wrap=False)
    missing = missing_packages()
    if given.list:
        for part in parts.values():
            console.print(escape(f"{part.name}: {part.what}, at most {part.limit_s:.0f} s"), soft_wrap=True)
        console.print(escape("missing here: " + (", ".join(missing) or "nothing")), soft_wrap=True)
        return 0
    import torch

    if missing:
        parser.error(f"packages: pip install {' '.join(repr(m) for m in missing)}")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error(
            f"device: PyTorch {torch.__version__} sees no CUDA device here; --rehearse runs tiny sizes on the CPU"
        )
    out = given.out or Path("results/gpu") / datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    title = "GPU check, rehearsed on a CPU: says nothing of a GPU" if given.rehearse else "GPU check"
    machine = {"title": title, "when": datetime.now(UTC).isoformat(timespec="seconds"), **describe_machine(device_type)}
    chosen = [part for name, part in parts.items() if not only or name in only]
    outcomes = check(chosen, out.resolve(), given.minutes, machine, console)
    console.print(escape(f"written to {out}"))
    return 0 if all(outcome.reached for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
