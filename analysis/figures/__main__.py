"""Draw all figures that the results in a folder allow: `python -m analysis.figures results/skew_sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.figures.base import FigureData, draw_all
from analysis.load import find_runs, load_sweep
from analysis.summary import summarise
from analysis.table import figure_caption, skew_points, summary_frame


def main() -> None:
    """Draw, and list what is missing."""
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description=__doc__)
    parser.add_argument("folder", type=Path, help="a sweep's folder (with sweep.json), or a folder of runs")
    parser.add_argument("--out", type=Path, help="where to put them (default: figures in the folder)")
    parser.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        help="draw what the paper published as open markers: on the same axes where model, machine and conditions are "
        "the paper's (done by itself), else in a relative panel",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        if (folder / "sweep.json").exists():
            sweep = load_sweep(folder)
            runs, points = sweep.runs, sweep.points
        else:
            runs = find_runs(folder)
            points = skew_points(runs)
    except ValueError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"{folder}: no finished run; python run.py experiment=skew_sweep makes some")
    frame = summary_frame(runs, [summarise(run) for run in runs], points)
    data = FigureData(frame, list(points[0]), figure_caption(frame), runs, arguments.published)
    drawn, lacking = draw_all(data, arguments.out or folder / "figures")
    for path in drawn:
        print(path)
    for name, reason in lacking.items():
        print(f"not drawn: {name} ({reason})")


if __name__ == "__main__":
    main()
