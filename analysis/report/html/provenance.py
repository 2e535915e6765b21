"""Configuration and environment of a section: what ran, on what, and in what the points differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from analysis.data.load import Run
from analysis.present.style import label, look
from analysis.report.html.section import Section


@dataclass(frozen=True)
class SystemCard:
    """What a system is: its policy, and its options with what calibration filled in."""

    name: str
    label: str
    colour: str
    policy: str
    description: str
    options: str
    kind: str


def systems_of(section: Section) -> list[SystemCard]:
    """Describe the systems."""
    return [
        SystemCard(
            name=name,
            label=label(name),
            colour=look(name).colour,
            policy=str(kind.get("policy", "")),
            description=str(kind.get("description", "")),
            options=", ".join(f"{key} = {_text(value)}" for key, value in (kind.get("options") or {}).items()),
            kind=_kind(kind),
        )
        for name, kind in section.systems.items()
    ]


def differences(section: Section) -> list[tuple[str, list[str]]]:
    """Return what is not the same in the configurations of all points: the option and its value at every point."""
    flat = [flatten(run.config) for run in section.runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = [(key, [_text(config.get(key)) if key in config else "" for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_text(run: Run) -> str:
    """Return a run's resolved configuration as YAML."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)


def environment(section: Section) -> list[tuple[str, str]]:
    """Return what the manifests say of where the runs ran; where runs differ, every value that there is."""
    manifests = [run.manifest for run in section.runs]
    flat = [flatten({key: value for key, value in manifest.items() if key in _SHOWN}) for manifest in manifests]
    links = " | ".join(dict.fromkeys(section.frame["host_link"]))
    rows = [("host_link", links)]
    for key in sorted(dict.fromkeys(key for values in flat for key in values), key=_order):
        values = list(dict.fromkeys(_text(of_run[key]) for of_run in flat if key in of_run))
        if key in ("started_at", "ended_at") and len(values) > 1:
            values = [min(values) if key == "started_at" else max(values)]
        rows.append((key, " | ".join(values)))
    return sorted(rows, key=lambda row: _order(row[0]))


def checks_of(section: Section) -> list[tuple[str, str, str, bool]]:
    """Return per system the largest error of its outputs, what is allowed, and whether every check was passed."""
    rows = []
    for name in section.systems:
        checks = [found for run in section.runs if (found := (run.manifest.get("checks") or {}).get(name))]
        errors = [e for check in checks if (e := check.get("relative_error")) is not None]
        if errors:
            allowed = max(check.get("tolerance", 0.0) for check in checks)
            passed = all(check.get("passed", False) for check in checks)
            rows.append((label(name), f"{max(errors):.1e}", f"{allowed:.0e}", passed))
    return rows


_SHOWN = (
    "backend", "device", "hardware_source", "world_size", "threads_per_rank", "exchange", "host", "packages", "git",
    "started_at", "ended_at", "seed", "scope", "model", "dataset", "calibration", "experiment",
)  # fmt: skip


def _order(key: str) -> tuple[int, str]:
    first = key.split(".", 1)[0]
    if first == "host_link":
        return 1, "~"
    return (_SHOWN.index(first) if first in _SHOWN else len(_SHOWN)), ""


def _kind(kind: Mapping[str, Any]) -> str:
    if kind["bound"]:
        return "reference, no system"
    words: Sequence[str] = ("baseline" if kind["baseline"] else "ours", "exact" if kind["exact"] else "drops tokens")
    return ", ".join(words)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str)
