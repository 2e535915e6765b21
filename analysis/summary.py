"""Recompute summary.json of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.data.load import load_run
from analysis.data.summary import write_summary
from results_schema.files import SUMMARY
from results_schema.printing import print_anything


def main() -> None:
    """Recompute the summaries of the folders named on the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m analysis.summary", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="folder of a finished run")
    for folder in parser.parse_args().folder:
        try:
            write_summary(load_run(folder))
        except ValueError as error:
            parser.error(str(error))
        print(folder / SUMMARY)


if __name__ == "__main__":
    main()
