"""What results a folder has, read from manifests and summaries alone, so that thousands of runs take seconds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from analysis.data.load import run_folders, sweep_folders
from results_schema.files import CONFIG, SUMMARY, SWEEP
from results_schema.manifest import Status, read_manifest

_THROUGHPUT = "throughput_tokens_per_s"


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


def catalogue(folder: Path) -> list[Entry]:
    """Return the sweeps in or under a folder and the runs that are in none of them, the latest first.

    Raises:
        ValueError: it is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of results")
    entries, swept = [], set[Path]()
    for path in sweep_folders(folder):
        try:
            content = json.loads((path / SWEEP).read_text(encoding="utf-8"))
            runs = [path.parent.parent / run_id for run_id in content["run_ids"]]
            experiment = str(content["experiment"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a torn file is no sweep; its runs stand for themselves
        swept |= {run.resolve() for run in runs}
        entries.append(_entry(path, experiment, runs))
    singles = [run for run in run_folders(folder) if run.resolve() not in swept]
    entries += [_entry(run, "", [run]) for run in singles]
    return sorted(entries, key=lambda entry: entry.ended_at, reverse=True)


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


def find(folder: Path, wanted: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the runs with all these values, by path, and their manifests.

    Args:
        folder: where to look.
        wanted: values as text, by option (``router.skew``, ``model.top_k``) or field of the manifest (``device``,
            ``status``, ``systems.eplb.exact``).
    """
    for path in run_folders(folder):
        try:
            manifest = read_manifest(path)
            config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if all(value in (_text(config, name), _text(manifest, name)) for name, value in wanted.items()):
            yield path, manifest


def _text(values: Any, name: str) -> str | None:
    """Return what stands under a dotted name, as it is written on the command line; None: nothing does."""
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    if isinstance(values, float):
        return f"{values:g}"
    return {True: "true", False: "false", None: "null"}.get(values, str(values)) if _plain(values) else str(values)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
