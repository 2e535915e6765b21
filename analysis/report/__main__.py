"""Report a sweep or a run: the table that is printed, the static figures, and one HTML page that needs no network.

`python -m analysis.report results/skew_sweep` writes results/skew_sweep/report.html with a section for every sweep in
the folder, and for every run that belongs to none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.report.html.write import PAGE, write_report
from results_schema.printing import print_anything


def main() -> None:
    """Write the page of the folder named on the command line."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report",
        description="Write one HTML page, which needs no network, about a run, a sweep, or all of them in a folder: "
        "summary, warnings, interactive plots, table with intervals, configuration and environment.",
    )
    parser.add_argument(
        "folder", type=Path, help="a run (has manifest.json), a sweep (has sweep.json), or a folder that holds several"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the folder)")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.folder, arguments.out))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
