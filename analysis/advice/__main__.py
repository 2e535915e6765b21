"""Write the advice of a finished sweep of experiment=advise again."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.advice.write import HTML, MARKDOWN, write_advice
from analysis.data.load import load_sweep
from results_schema.printing import print_anything


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m analysis.advice", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep, as results/advise/sweeps/ID")
    folder = parser.parse_args().folder
    try:
        page = write_advice(load_sweep(folder))
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(page.lead))
    print(folder / HTML)
    print(folder / MARKDOWN)


if __name__ == "__main__":
    main()
