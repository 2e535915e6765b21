"""Draw the pictures that README and docs show again: run each one's experiment, and put its figure where it is shown.

Simulated pictures take a minute or two, the grid four; those of experiments on real ranks are measurements of the
machine at hand, on which nothing else should run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from results_schema.printing import print_anything

_DOCS, _DEMO, _PREDICTIONS = Path("docs/figures"), Path("results/demo"), Path("results/predictions")


@dataclass(frozen=True)
class Picture:
    """A picture, and what is shown beside it.

    Attributes:
        experiment: whose results have it.
        files: where they go, by their place in the folder of the sweep, or of a single run.
    """

    experiment: str
    files: Mapping[str, Path]


PICTURES = {
    "paper_skew": Picture("paper_skew", {"figures/skew_sweep.png": _DOCS / "paper_skew.png"}),
    "scale_out": Picture("scale_out", {"figures/scale_out.png": _DOCS / "scale_out.png"}),
    "grid": Picture(
        "grid",
        {
            "figures/grid.png": _DOCS / "grid.png",
            "figures/grid.csv": _PREDICTIONS / "grid_points.csv",
            "ratios.csv": _PREDICTIONS / "grid.csv",
        },
    ),
    "harmoeny_ablation": Picture(
        "harmoeny_ablation",
        {"figures/ablation.png": _DOCS / "ablation.png", "figures/ablation.csv": _PREDICTIONS / "ablation.csv"},
    ),
    "serving_h100": Picture(
        "serving_h100",
        {"figures/serving_rates.png": _DOCS / "serving_h100.png", "serving.csv": _PREDICTIONS / "serving_h100.csv"},
    ),
    "prefetch_ablation": Picture(
        "prefetch_ablation", {"figures/time_breakdown.png": _DOCS / "prefetch_ablation.png"}
    ),
    "demo": Picture(
        "skew_sweep",
        {
            "figures/skew_sweep.png": _DEMO / "skew_sweep.png",
            "figures/skew_sweep.csv": _DEMO / "skew_sweep.csv",
            "table.txt": _DEMO / "table.txt",
        },
    ),
}  # fmt: skip


def draw(picture: Picture, results_dir: Path) -> None:
    """Run the experiment into an empty folder and copy its files.

    Raises:
        subprocess.CalledProcessError: the experiment failed.
    """
    command = [sys.executable, "run.py", f"experiment={picture.experiment}", "wandb.mode=disabled"]
    subprocess.run([*command, f"results_dir={results_dir}"], check=True)  # noqa: S603  (our own program)
    parent = results_dir / picture.experiment
    (folder,) = (parent / "sweeps" if (parent / "sweeps").is_dir() else parent).iterdir()
    for source, target in picture.files.items():
        shutil.copy(folder / source, target)
        print(target)


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.pictures", description=__doc__)
    parser.add_argument("names", nargs="+", choices=PICTURES, metavar="NAME", help=", ".join(PICTURES))
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            draw(PICTURES[name], Path(folder))


if __name__ == "__main__":
    main()
