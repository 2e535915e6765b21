"""Compares two sweeps or runs point by point: paired by round where they can be, else with a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.data.load import Run, find_runs, load_run, load_sweep
from analysis.data.pairing import group_of, run_ratio, throughput
from analysis.data.stats import Estimate
from results_schema.files import MANIFEST, SWEEP
from results_schema.manifest import NOT_MEASURED

#: Options in which what is compared may differ: how long it was measured, under what name, and with which systems.
_MAY_DIFFER = (
    *NOT_MEASURED, "tag", "systems", "simulator", "rounds", "warmup_rounds", "until", "max_rounds", "max_minutes",
)  # fmt: skip
_RESAMPLES = 2000
_UNPAIRED = (
    "not paired: the two were not measured together, and whatever the machine did differently on the two occasions is "
    "in the ratios"
)
_UNPAIRED_SIMULATIONS = (
    "not paired: other batches may have been simulated, so their spread is in the intervals; the same command into two "
    "results_dir=, with one tag=, makes pairs"
)


@dataclass(frozen=True)
class Change:
    """One system at one point, before and after.

    Attributes:
        point: what tells the point from the others; empty: there is only one.
        system: its name.
        ratio: throughput after to before.
        paired: whether it is paired by round.
    """

    point: str
    system: str
    ratio: Estimate
    paired: bool

    def is_slower(self, share: float) -> bool:
        """Tell whether it is slower by more than a share, for certain: all of its interval says so."""
        return self.ratio.high < 1 - share


@dataclass(frozen=True)
class Comparison:
    """Two results beside each other.

    Attributes:
        changes: of what both have.
        warnings: why ratios may say less than they seem to.
    """

    changes: Sequence[Change]
    warnings: Sequence[str] = field(default_factory=list)


def compare(before: Path, after: Path) -> Comparison:
    """Compare the throughput of the exact systems that two sweeps, runs or folders of them have at the same points.

    Raises:
        ValueError: one cannot be read, or they have nothing in common.
    """
    old, new = _runs(before), _runs(after)
    pairs = [(one, other) for other in new if (one := _same_point(other, old)) is not None]
    if not pairs:
        raise ValueError(f"{after}: has no point of {before}")
    changes = []
    for one, other in pairs:
        paired = is_paired(one, other)
        names = [n for n in other.systems if n in one.systems and other.systems[n]["exact"]]
        for name in names:
            a, b = throughput(one, name), throughput(other, name)
            if a.empty or b.empty:
                continue
            ratio = run_ratio(other, b, a, one) if paired else unpaired_ratio(b.to_numpy(), a.to_numpy())
            changes.append(Change(_title(other, [run for _, run in pairs]), name, ratio, paired))
    return Comparison(changes, _warnings(pairs, changes, len(old), len(new)))


def is_paired(one: Run, other: Run) -> bool:
    """Tell whether rounds of the same number are pairs: measured together, or simulated from the same batches.

    A run's id covers all that its batches depend on, recorded routing included.
    """
    if one.simulated or other.simulated:
        return one.simulated and other.simulated and one.manifest["run_id"] == other.manifest["run_id"]
    group = group_of(one).get("id")
    return group is not None and group == group_of(other).get("id")


def unpaired_ratio(numerator: np.ndarray[Any, Any], denominator: np.ndarray[Any, Any]) -> Estimate:
    """Return the ratio of the medians of two independent samples, with its percentile bootstrap 95 % interval."""
    rng = np.random.default_rng(0)
    tops, bottoms = (
        np.median(values[rng.integers(0, len(values), (_RESAMPLES, len(values)))], axis=1)
        for values in (numerator, denominator)
    )
    low, high = np.quantile(tops / bottoms, [0.025, 0.975])
    middle = float(np.median(numerator) / np.median(denominator))
    return Estimate(middle, float(low), float(high), min(len(numerator), len(denominator)))


def _runs(folder: Path) -> list[Run]:
    if (folder / SWEEP).exists():
        runs = load_sweep(folder).runs
    elif (folder / MANIFEST).exists():
        runs = [load_run(folder)]
    elif folder.is_dir():
        runs = find_runs(folder)
    else:
        raise ValueError(f"{folder}: must be the folder of a sweep or a run, or one that holds some")
    if not runs:
        raise ValueError(f"{folder}: no finished run in it")
    return runs


def _same_point(run: Run, candidates: Sequence[Run]) -> Run | None:
    """Return the run of the same point; options that only one of the two revisions has do not count."""
    own = _options(run.config)
    for other in candidates:
        theirs = _options(other.config)
        if all(theirs[name] == value for name, value in own.items() if name in theirs):
            return other
    return None


def _options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the options that make a point, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if not prefix and name in _MAY_DIFFER:
            continue
        if isinstance(value, Mapping):
            found |= _options(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _title(run: Run, runs: Sequence[Run]) -> str:
    """Name a point by the options in which it differs from the others."""
    tables = [_options(other.config) for other in runs]
    own = _options(run.config)
    different = [name for name in own if any(table.get(name) != own[name] for table in tables)]
    return ", ".join(f"{name}={own[name]}" for name in different)


def _warnings(pairs: Sequence[tuple[Run, Run]], changes: Sequence[Change], old: int, new: int) -> list[str]:
    warnings = []
    if not all(change.paired for change in changes):
        simulated = all(run.simulated for pair in pairs for run in pair)
        warnings.append(_UNPAIRED_SIMULATIONS if simulated else _UNPAIRED)
    for name in ("device", "backend"):
        found = {str(run.manifest.get(name)) for pair in pairs for run in pair}
        if len(found) > 1:
            warnings.append(f"several of {name}: {', '.join(sorted(found))}")
    if len(pairs) < max(old, new):
        warnings.append(f"{len(pairs)} points are in both, of {old} and {new}")
    return warnings
