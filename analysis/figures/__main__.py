"""Draw figures of results, as PNG, PDF and the CSV behind each.

Without a folder, of all results: every sweep and every run in results/, each into a folder of its own below
results/figures, named <experiment>/<measured or simulated>-<device>-<id>. Then follows which figures no result allowed,
with the commands that give them. `make figures` does this with --simulate.

With a folder, of the sweep or the runs in it, into the folder's own figures/.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from analysis.data.load import find_runs, load_sweep
from analysis.data.summary import write_summary
from analysis.figures.kit.base import FigureModule, draw_all, figure_data
from analysis.figures.kit.result_sets import ResultSets, find_result_sets
from analysis.present.table import skew_points
from results_schema.files import SWEEP
from results_schema.printing import print_anything

_ROOT = Path(__file__).resolve().parents[2]
#: Experiments that simulate what the paper shows, under its conditions.
_PAPER = ("paper_skew", "paper_breakdown")
#: Most of a simulation runs on one core.
_SIMULATIONS_AT_ONCE = 2


def main() -> None:
    """Draw, and list what is missing."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="a sweep's folder (with sweep.json), or one of runs; default: all results",
    )
    parser.add_argument("--out", type=Path, help="where to put them (default: figures in the folder, or in results)")
    parser.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        help="draw what the paper published as open markers: on the same axes where model, machine and conditions are "
        "the paper's (done by itself), else in a relative panel",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="all results (default: results)")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="first simulate the experiments of those figures that no result allows, and the paper's main ones, which "
        "stand beside what it published; takes about two minutes",
    )
    arguments = parser.parse_args()
    if arguments.folder is not None:
        if arguments.simulate:
            parser.error("--simulate: not with a folder")
        try:
            _draw_folder(arguments.folder, arguments.out, arguments.published)
        except ValueError as error:
            parser.error(str(error))
        return
    _draw_everything(
        arguments.results, arguments.out or arguments.results / "figures", arguments.published,
        simulate=arguments.simulate,
    )  # fmt: skip


def _draw_folder(folder: Path, out: Path | None, published: bool | None) -> None:
    """Draw a sweep, or the runs in a folder, and say what is not drawn and why."""
    if (folder / SWEEP).exists():
        sweep = load_sweep(folder)
        runs, points = sweep.runs, sweep.points
    else:
        runs = find_runs(folder)
        points = skew_points(runs)
    if not runs:
        raise ValueError(f"{folder}: no finished run; python run.py experiment=skew_sweep makes some")
    drawn, lacking = draw_all(figure_data(runs, points, published), out or folder / "figures")
    for path in drawn:
        print(path)
    for name, reason in lacking.items():
        print(f"not drawn: {name} ({reason})")


def _draw_everything(results: Path, out: Path, published: bool | None, *, simulate: bool) -> None:
    """Draw all results, after simulating those that are missing if asked for."""
    found = find_result_sets(results, published)
    if simulate and (commands := _simulations(found)):
        with ThreadPoolExecutor(_SIMULATIONS_AT_ONCE) as pool:
            for line in pool.map(lambda command: _simulate(command, results), commands):
                print(line, flush=True)
        found = find_result_sets(results, published)
    for folder, names in found.draw(out):
        print(f"{folder}: {', '.join(names)}", flush=True)
    for problem in found.unreadable:
        print(f"passed over: {problem}")
    for line in missing_lines(found):
        print(line)


def _simulations(found: ResultSets) -> list[str]:
    """Return what gives the figures that no result allows, and the paper's own with the published values on them."""
    experiments = {one.name.parts[0] for one in found.sets}
    commands = [module.SOURCE.simulation for module in found.lacking()]
    commands += [f"python run.py experiment={name}" for name in _PAPER if name not in experiments]
    return list(dict.fromkeys(commands))


def missing_lines(found: ResultSets) -> list[str]:
    """Say which figures are missing, or show simulations only, with the commands that give them."""
    lines = []
    if only := found.only_simulated():
        lines += ["", "Simulated only; on real ranks:"]
        lines += [f"  {module.NAME}: {_measured(module)}" for module in only]
    if lacking := found.lacking():
        lines += ["", "Not drawn, since no result allows it:"]
        for module in lacking:
            if module.SOURCE.minutes is not None:
                lines.append(f"  {module.NAME}: {_measured(module)}")
            lines.append(f"  {module.NAME}: {module.SOURCE.simulation} (simulated, seconds)")
    return lines


def _measured(module: FigureModule) -> str:
    return f"{module.SOURCE.command} (about {module.SOURCE.minutes:g} min on two cores)"


def _simulate(command: str, results: Path) -> str:
    """Run a simulation and return a line about it; what it prints is kept back, unless it fails.

    Its figures are drawn with all others, so it reports nothing itself.
    """
    start = time.perf_counter()
    options = [*shlex.split(command)[2:], f"results_dir={results.resolve()}", "~hydra.callbacks.report"]
    done = subprocess.run(  # noqa: S603  (a command of the registry)
        [sys.executable, "run.py", *options], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return f"failed: {command}\n{done.stderr.strip()}"
    for run in find_runs(results / options[0].removeprefix("experiment=")):
        write_summary(run)
    return f"{command} ({time.perf_counter() - start:.0f} s)"


if __name__ == "__main__":
    main()
