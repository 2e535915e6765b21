"""Runs everything that only a GPU can show, in the minutes that there are: the longest part first, each with its limit.

Results are written as they come: RESULTS/PART.log and what the part itself writes, then machine.json and table.md with
what was reached. It runs from a checkout and needs these packages, of which --list names those that are missing here:
{packages}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from results_schema.printing import print_anything
from scripts.gpu_check.packages import missing_packages, needed_packages


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; 0 if every part ended and reached its goals."""
    print_anything()
    assert __doc__ is not None
    about = __doc__.format(packages=", ".join(map(str, needed_packages())))
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=about)
    parser.add_argument("--minutes", type=float, default=7, help="for everything together (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/gpu/DATE_TIME)")
    parser.add_argument("--only", metavar="PART,...", default="", help="run just these parts, in this order")
    parser.add_argument("--list", action="store_true", help="list the parts and what is missing here, and end")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on this CPU: shows that the check itself works"
    )
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes: {given.minutes:g}, must be above 0")
    missing = missing_packages()
    if missing and given.list:
        print("missing here, and needed to list the parts: " + ", ".join(missing))
        return 0
    if missing:
        parser.error(f"packages: pip install {' '.join(repr(m) for m in missing)}")
    # Only now, since without them nothing else can be imported.
    import torch
    from rich.console import Console
    from rich.markup import escape

    from scripts.gpu_check.check import check
    from scripts.gpu_check.machine import describe_machine
    from scripts.gpu_check.parts import all_parts

    device_type = "cpu" if given.rehearse else "cuda"
    parts = {part.name: part for part in all_parts(device_type, rehearsal=given.rehearse)}
    only = [name for name in given.only.split(",") if name]
    for name in only:
        if name not in parts:
            parser.error(f"--only: {name!r}, must be among {', '.join(parts)}")
    console = Console(soft_wrap=False)
    if given.list:
        for part in parts.values():
            console.print(escape(f"{part.name}: {part.what}, at most {part.limit_s:.0f} s"), soft_wrap=True)
        console.print("missing here: nothing", soft_wrap=True)
        return 0
    if not given.rehearse and not torch.cuda.is_available():
        parser.error(
            f"device: PyTorch {torch.__version__} sees no CUDA device here; --rehearse runs tiny sizes on the CPU"
        )
    out = given.out or Path("results/gpu") / datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    title = "GPU check, rehearsed on a CPU: says nothing of a GPU" if given.rehearse else "GPU check"
    machine = {"title": title, "when": datetime.now(UTC).isoformat(timespec="seconds"), **describe_machine(device_type)}
    chosen = [parts[name] for name in only or parts]
    outcomes = check(chosen, out.resolve(), given.minutes, machine, console)
    console.print(escape(f"written to {out}"))
    return 0 if all(outcome.reached for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
