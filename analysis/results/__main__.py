"""Results: list them, find runs by value, compare two of them, export one, and write a page that links all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from analysis.present.style import label
from analysis.present.table import TEXT_WIDTH
from analysis.results.catalogue import catalogue, find
from analysis.results.compare import Comparison, compare
from analysis.results.export import export
from analysis.results.index import write_index
from results_schema.printing import print_anything

RESULTS = Path("results")
#: Exit status where ``--fail-if-slower`` found something.
SLOWER = 1


def list_results(given: argparse.Namespace) -> int:
    """List all sweeps, and runs that are in none, the latest first."""
    entries = catalogue(given.folder)
    table = _table("experiment", "ended (UTC)", "machine", "points", "status", "first at most points", "folder")
    for entry in entries:
        points = f"{entry.num_finished} of {entry.num_points}"
        table.add_row(
            entry.experiment, entry.ended_at, entry.machine, points, entry.status, entry.best, str(entry.folder)
        )
    _print(table)
    return 0


def find_results(given: argparse.Namespace) -> int:
    """Find runs by value, as router.skew=0.9 what_if=as_recorded status=finished; prints their folders."""
    wanted = dict(word.partition("=")[::2] for word in given.values)
    if wrong := [word for word in given.values if "=" not in word]:
        raise ValueError(f"{wrong[0]!r}, must be NAME=VALUE")
    found = find(given.folder, wanted)
    for path, manifest in found.runs:
        print(f"{path}  {manifest['status']}")
    print(f"{len(found.runs)} runs", file=sys.stderr)
    for name, values in found.values.items():
        if values and wanted[name] not in values:
            print(f"none has {name}={wanted[name]}; they have {_some(sorted(values))}", file=sys.stderr)
    return 0


def _some(values: Sequence[str]) -> str:
    more = len(values) - _MOST_VALUES
    return ", ".join(values[:_MOST_VALUES]) + (f" and {more} others" if more > 0 else "")


def compare_results(given: argparse.Namespace) -> int:
    """Compare two sweeps or runs, point by point: throughput of the second to the first."""
    found = compare(given.before, given.after)
    table = _table("point", "system", "after to before", "paired")
    for change in found.changes:
        ratio = f"{change.ratio.median:.3f} [{change.ratio.low:.3f}, {change.ratio.high:.3f}]"
        table.add_row(change.point, label(change.system), ratio, "yes" if change.paired else "no")
    _print(table)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return _judge(found, given.fail_if_slower) if given.fail_if_slower is not None else 0


def _judge(found: Comparison, share: float) -> int:
    slower = [change for change in found.changes if change.is_slower(share)]
    for change in slower:
        where = f" at {change.point}" if change.point else ""
        print(f"slower by more than {share:.1%}: {label(change.system)}{where}: {change.ratio.median:.3f}")
    return SLOWER if slower else 0


def export_results(given: argparse.Namespace) -> int:
    """Write a folder that can be sent: report, figures, tables, manifests; no paths, users or hosts."""
    files = export(given.folder, given.out)
    print(f"{len(files)} files in {given.out}")
    return 0


def index_results(given: argparse.Namespace) -> int:
    """Write results.html, which links all reports."""
    print(write_index(catalogue(given.folder), given.folder))
    return 0


def share_of(text: str) -> float:
    """Return a share that is written as 5% or 0.05."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, must be a share such as 5% or 0.05")
    return share


#: Values that are told where none of them was asked for.
_MOST_VALUES = 8
#: Letters per line, at most, where no terminal says how many it has.
_WIDEST = 400


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:  # folders are to be copied, or cut out by a program: none is broken
        console = Console(width=max(TEXT_WIDTH, Console(width=_WIDEST).measure(table).maximum))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m analysis.results", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: object) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        made.set_defaults(function=function)
        return made

    for name, function in (("list", list_results), ("index", index_results)):
        command(name, function).add_argument("folder", nargs="?", type=Path, default=RESULTS, help="(%(default)s)")
    found = command("find", find_results)
    found.add_argument(
        "values", nargs="+", metavar="NAME=VALUE", help="an option, a swept one too, or a field of the manifest"
    )
    found.add_argument("--folder", type=Path, default=RESULTS, help="(%(default)s)")
    both = command("compare", compare_results)
    both.add_argument("before", type=Path, help="folder of a sweep or a run")
    both.add_argument("after", type=Path, help="likewise")
    both.add_argument(
        "--fail-if-slower", type=share_of, metavar="5%%", help="status 1 where a system surely is, by more"
    )
    sent = command("export", export_results)
    sent.add_argument("folder", type=Path, help="of a sweep or a run")
    sent.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    try:
        status: int = given.function(given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
