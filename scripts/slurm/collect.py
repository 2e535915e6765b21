"""Report every sweep in a folder of results, as far as its points are finished: tables and figures.

python -m scripts.slurm.collect results/skew_sweep
"""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.data.load import load_sweep, sweep_folders
from analysis.report.reports import report_sweep
from results_schema.printing import print_anything


def main() -> None:
    """Report, and name what is missing."""
    print_anything()
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m scripts.slurm.collect", description=about)
    parser.add_argument("folder", type=Path, help="holds the results of one experiment or of several")
    folder: Path = parser.parse_args().folder
    sweeps = sweep_folders(folder)
    if not sweeps:
        parser.error(f"{folder}: no sweep in it, must be a folder of results such as results/skew_sweep")
    try:
        for sweep in sweeps:
            report_sweep(load_sweep(sweep))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
