"""Validate the simulator: `paper` against the published figures of arXiv 2506.12417, `ranks` against this machine.

`paper` reads the authors' data from --reference; `ranks` reads finished runs on real ranks of this machine and
simulates them on its profile (python -m scripts.calibrate writes one). Both write tables and a figure to
results/validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import yaml

from analysis.present.prediction_figure import draw_validation
from experiments.compose.compose import compose_point
from experiments.compose.load import load_point
from experiments.launch.ranks import Ranks
from experiments.point.point import Point
from experiments.simulator.backend import Simulator
from experiments.simulator.paper.figures import throughputs
from experiments.simulator.paper.validation import (
    PaperMachine,
    compare_breakdowns,
    compare_ranks,
    compare_throughputs,
    summarise_errors,
    wrong_rankings,
)
from results_schema.atomic import write_text
from results_schema.files import CONFIG
from results_schema.printing import print_anything
from results_schema.tables import LAYERS
from results_schema.walk import walk_files

REFERENCE = Path("../shared/reference/harmoeny-paper")
OUT = Path("results/validation")
_PERCENT = {"error": "{:+.1%}".format, "published": "{:.1f}".format, "predicted": "{:.1f}".format}


def validate_paper(reference: Path, out: Path, num_batches: int) -> None:
    """Compare with the published figures; print and write tables, and draw."""
    machine = PaperMachine(compose_point("experiment=paper_gpus"))
    breakdowns = compare_breakdowns(machine, reference)
    compared = compare_throughputs(machine, reference, throughputs(reference), num_batches)
    write_text(out / "paper_breakdowns.csv", breakdowns.to_csv(index=False, float_format="%.4g"))
    write_text(out / "paper_throughputs.csv", compared.to_csv(index=False, float_format="%.5g"))
    _show("Time breakdowns, ms (calibration)", breakdowns)
    _show("Throughput of Switch-128, sequences/s", compared)
    errors = summarise_errors(compared)
    print(
        f"{errors['points']:.0f} points that nothing was fitted on: median error {errors['median']:.1%}, "
        f"worst {errors['worst']:.1%}"
    )
    wrong = wrong_rankings(compared)
    print(f"wrong order, where the published figures differ by more than 5 %: {'; '.join(wrong) or 'none'}")
    caption = "Measured: arXiv 2506.12417, 8 x V100. Predicted: simulator, hardware dgx1_v100."
    print(draw_validation(compared, out, "paper", "Throughput (sequences/s)", caption))


def validate_ranks(folder: Path, hardware: str, out: Path) -> None:
    """Compare with real runs of this machine; print and write a table, and draw."""
    compared = compare_ranks(_simulated_runs(folder, hardware))
    write_text(out / "ranks.csv", compared.to_csv(index=False, float_format="%.4g"))
    _show("Latency of a MoE layer, ms (published: measured here)", compared)
    errors = summarise_errors(compared)
    print(f"{errors['points']:.0f} points: median error {errors['median']:.1%}, worst {errors['worst']:.1%}")
    devices = ", ".join(compared["device"].unique())
    caption = f"Measured: real ranks, {devices}. Predicted: simulator, hardware {hardware}."
    print(draw_validation(compared, out, "ranks", "Latency of a MoE layer (ms)", caption))


def _simulated_runs(folder: Path, hardware: str) -> list[tuple[Path, Point]]:
    """Return the folders of runs on real ranks, and for each its point as the simulator will run it.

    Raises:
        ValueError: there is no such run.
    """
    described = compose_point(f"hardware={hardware}").options.hardware
    runs = []
    for path in sorted(file for file in walk_files(folder, skip_unreadable=True) if file.name == LAYERS.file):
        config = yaml.safe_load((path.parent / CONFIG).read_text(encoding="utf-8"))
        if config["backend"] == Ranks.name:
            changed = {"backend": Simulator.name, "hardware": described}
            runs.append((path.parent, load_point(config | changed)))
    if not runs:
        raise ValueError(f"{folder}: no run on real ranks; python run.py experiment=skew_sweep hardware={hardware}")
    return runs


def _show(title: str, frame: pd.DataFrame) -> None:
    formats = {name: form for name, form in _PERCENT.items() if name in frame}
    print(f"\n{title}\n{frame.to_string(index=False, formatters=formats)}\n")


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.validate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    paper = commands.add_parser("paper", help="against the published figures")
    paper.add_argument("--reference", type=Path, default=REFERENCE, help=f"the authors' data (default: {REFERENCE})")
    paper.add_argument("--out", type=Path, default=OUT, help=f"where results go (default: {OUT})")
    paper.add_argument("--batches", type=int, default=3, help="batches per point (default: 3)")
    ranks = commands.add_parser("ranks", help="against runs on real ranks of this machine")
    ranks.add_argument("folder", type=Path, help="finished runs: python run.py experiment=skew_sweep hardware=NAME")
    ranks.add_argument("--hardware", required=True, help="this machine's profile in conf/hardware")
    ranks.add_argument("--out", type=Path, default=OUT, help=f"where results go (default: {OUT})")
    arguments = parser.parse_args()
    if arguments.command == "ranks":
        try:
            validate_ranks(arguments.folder, arguments.hardware, arguments.out)
        except ValueError as error:
            parser.error(str(error))
        return
    if not arguments.reference.is_dir():
        parser.error(f"--reference: {str(arguments.reference)!r}, must be the folder with the authors' CSV files")
    validate_paper(arguments.reference, arguments.out, arguments.batches)


if __name__ == "__main__":
    main()
