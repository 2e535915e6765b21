"""Times how long a rank orders its work, and compares it with the budget where nothing is fetched.

A rank of one MoE layer has a slice of every expert, of which it holds all or all but a few.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from harmoeny.cost import ExpertCost
from harmoeny.runtime.device import Device
from harmoeny.runtime.memory.schedule import make_schedule
from results_schema.printing import print_anything

#: Microseconds that the median may take for the largest layer of which nothing is fetched.
BUDGET_US = 30.0
_NUM_SLICES = (16, 64, 128)
_NUM_FETCHED = (0, 4)
_COST = ExpertCost(token_s=1e-6, fetch_s=1e-3)
_WARM_UP, _SAMPLES = 20, 500


def time_us(num_slices: int, num_fetched: int, *, grouped: bool) -> float:
    """Return the median time of one schedule, in microseconds."""
    executed = np.random.default_rng(0).integers(1, 256, (1, num_slices))
    home = list(range(num_slices - num_fetched))
    samples = []
    for _ in range(_WARM_UP + _SAMPLES):
        start_ns = time.perf_counter_ns()
        make_schedule(executed, home, _COST, grouped=grouped)
        samples.append((time.perf_counter_ns() - start_ns) / 1e3)
    return median(samples[_WARM_UP:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where the budget was missed."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.schedule", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to FILE as well")
    arguments = parser.parse_args(argv)
    table = Table(title=f"Time of make_schedule, {Device.of(torch.device('cpu')).name}")
    for column in ("slices", "fetched", "waves", "median us", "budget us"):
        table.add_column(column, justify="left" if column == "waves" else "right")
    rows = []
    missed = []
    for num_slices, num_fetched, grouped in itertools.product(_NUM_SLICES, _NUM_FETCHED, (False, True)):
        found_us = time_us(num_slices, num_fetched, grouped=grouped)
        row = {"slices": num_slices, "fetched": num_fetched, "grouped": grouped, "median_us": found_us}
        rows.append(row)
        table.add_row(
            str(num_slices), str(num_fetched), "as large as can be" if grouped else "single slices", f"{found_us:.1f}",
            "" if num_fetched else f"{BUDGET_US:.0f}",
        )  # fmt: skip
        if not num_fetched and found_us > BUDGET_US:
            missed.append(row)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in missed:
        print(f"missed: {row}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
