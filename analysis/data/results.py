"""All results in a folder: its sweeps, the runs that belong to none, and what cannot be shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from analysis.data.load import Run, Sweep, load_run, load_sweep, run_folders, sweep_folders
from results_schema.manifest import is_finished


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        sweeps: those of which some run is finished, by path.
        single_runs: finished runs that are in none of them, by path.
        unfinished: names of runs that did not come to an end and that no sweep here lists as missing.
        unreadable: what is wrong with finished runs and sweeps that cannot be read; one damaged or old result does not
            hide the others.
    """

    sweeps: list[Sweep] = field(default_factory=list)
    single_runs: list[Run] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find_results(folder: Path) -> Results:
    """Load all that can be read in or under a folder."""
    results, problems = Results(), dict[str, None]()  # a damaged run may be met twice: in its sweep and by itself
    for path in sweep_folders(folder):
        try:
            sweep = load_sweep(path)
        except ValueError as error:
            problems[str(error)] = None
            continue
        if sweep.runs:
            results.sweeps.append(sweep)
    swept = {run.folder.resolve() for sweep in results.sweeps for run in sweep.runs}
    missing = {run_id for sweep in results.sweeps for run_id in sweep.missing}
    for path in run_folders(folder):
        if path.resolve() in swept:
            continue
        if not is_finished(path):
            results.unfinished.extend([path.name] if path.name not in missing else [])
            continue
        try:
            results.single_runs.append(load_run(path))
        except ValueError as error:
            problems[str(error)] = None
    results.unreadable.extend(problems)
    return results
