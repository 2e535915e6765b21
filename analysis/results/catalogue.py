"""What results a folder has, read from manifests and summaries alone, so that thousands of runs take seconds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from analysis.data.load import run_folders, sweep_folders
from results_schema.files import CONFIG, SUMMARY, SWEEP
from results_schema.manifest import Status, read_manifest

_THROUGHPUT = "throughput_tokens_per_s"
#: Names that are told where one is unknown.
_MOST_NAMED = 5


@dataclass(frozen=True)
class Entry:
    """A sweep, or a run that is in none.

    Attributes:
        folder: of it.
        experiment: its name.
        manifests: of its runs that have one.
        num_points: runs that it has, or will have.
        first: at how many points every exact system has the highest throughput.
    """

    folder: Path
    experiment: str
    manifests: Sequence[Mapping[str, Any]]
    num_points: int
    first: Counter[str] = field(default_factory=Counter)

    @property
    def num_finished(self) -> int:
        """Finished runs."""
        return sum(manifest["status"] == Status.FINISHED for manifest in self.manifests)

    @property
    def status(self) -> str:
        """``finished``; else what its runs are, the worst first."""
        if self.num_finished == self.num_points:
            return Status.FINISHED.value
        statuses = {str(manifest["status"]) for manifest in self.manifests}
        return next((s.value for s in (Status.FAILED, Status.RUNNING) if s in statuses), "incomplete")

    @property
    def ended_at(self) -> str:
        """When its last run ended, UTC, to the minute; empty: none has."""
        return max((str(m.get("ended_at") or "") for m in self.manifests), default="")[:16].replace("T", " ")

    @property
    def machine(self) -> str:
        """What it ran on, or was simulated for."""
        names = dict.fromkeys(f"{m['device']} ({m['backend']})" for m in self.manifests if "device" in m)
        return ", ".join(names)

    @property
    def best(self) -> str:
        """The system that is first at the most points, and at how many."""
        return ", ".join(f"{system} ({number})" for system, number in self.first.most_common(1))


@dataclass(frozen=True)
class Found:
    """Runs that were looked for.

    Attributes:
        runs: their folders and manifests, by path.
        values: by name that was asked for, the values that runs in the folder have.
    """

    runs: list[tuple[Path, dict[str, Any]]]
    values: dict[str, set[str]]


def catalogue(folder: Path) -> list[Entry]:
    """Return the sweeps in or under a folder and the runs that are in none of them, the latest first.

    Raises:
        ValueError: it is no folder.
    """
    entries, swept = [], set[Path]()
    for path, content in _sweeps(folder):
        runs = _runs_of(path, content)
        swept |= {run.resolve() for run in runs}
        entries.append(_entry(path, str(content["experiment"]), runs))
    singles = [run for run in run_folders(folder) if run.resolve() not in swept]
    entries += [_entry(run, "", [run]) for run in singles]
    return sorted(entries, key=lambda entry: entry.ended_at, reverse=True)


def _sweeps(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders and contents of the sweeps in a folder.

    Raises:
        ValueError: it is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of results")
    found = []
    for path in sweep_folders(folder):
        try:
            content = json.loads((path / SWEEP).read_text(encoding="utf-8"))
            if all(isinstance(content[name], list) for name in ("run_ids", "values")) and content["experiment"]:
                found.append((path, content))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a torn file is no sweep; its runs stand for themselves
    return found


def _runs_of(sweep: Path, content: Mapping[str, Any]) -> list[Path]:
    return [sweep.parent.parent / str(run_id) for run_id in content["run_ids"]]


def _entry(folder: Path, experiment: str, runs: Sequence[Path]) -> Entry:
    manifests, first = [], Counter[str]()
    for run in runs:
        try:
            manifests.append(read_manifest(run))
        except ValueError:
            continue
        first.update(_fastest(run))
    name = experiment or str(manifests[0].get("experiment", "?") if manifests else "?")
    return Entry(folder, name, manifests, len(runs), first)


def _fastest(run: Path) -> list[str]:
    """Return the exact system, no bound, with the highest median throughput, as the summary has it."""
    try:
        systems = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["systems"]
        medians = {n: s[_THROUGHPUT]["median"] for n, s in systems.items() if s["exact"] and not s["bound"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [max(medians, key=lambda name: medians[name])] if medians else []


def find(folder: Path, wanted: Mapping[str, str]) -> Found:
    """Find the runs with all these values.

    Args:
        folder: where to look.
        wanted: values as text, by option (``router.skew``, ``model.top_k``), swept option (``what_if``, ``model``) or
            field of the manifest (``device``, ``status``, ``systems.eplb.exact``).

    Raises:
        ValueError: it is no folder, or no run in it has anything of such a name.
    """
    swept, found = _swept_values(folder), Found([], {name: set() for name in wanted})
    names = set[str]()
    for path in run_folders(folder):
        try:
            manifest = read_manifest(path)
            config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        tables = [_flat(config), _flat(manifest), _flat(manifest.get("point")), *swept.get(path.resolve(), ())]
        names.update(*tables)
        values = {name: {table[name] for table in tables if name in table} for name in wanted}
        for name, of_run in values.items():
            found.values[name] |= of_run
        if all(value in values[name] for name, value in wanted.items()):
            found.runs.append((path, manifest))
    for name, of_all in found.values.items():
        if names and not of_all:
            close = ", ".join(_like(name, names))
            raise ValueError(
                f"{name!r}, must be an option or a field of the manifest that a run in {folder} has"
                + (f", as {close}" if close else "")
            )
    return found


def _like(name: str, names: set[str]) -> list[str]:
    """Return names that have a part of the same name, the shortest first; where none has, similar ones."""
    same_part = sorted((n for n in names if name in n.split(".")), key=lambda n: (len(n), n))
    return (same_part or get_close_matches(name, sorted(names)))[:_MOST_NAMED]


def _swept_values(folder: Path) -> dict[Path, list[dict[str, str]]]:
    """Return what sweeps in a folder say of their runs' swept options, by the run's path."""
    found: dict[Path, list[dict[str, str]]] = {}
    for path, content in _sweeps(folder):
        for run, values in zip(_runs_of(path, content), content["values"], strict=False):
            found.setdefault(run.resolve(), []).append(_flat(values))
    return found


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Return plain data by dotted name, as it is written on the command line."""
    found: dict[str, str] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
