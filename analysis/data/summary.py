"""summary.json: medians with intervals for every system of a run, and paired ratios to its best baseline."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from analysis.data.load import Run
from analysis.data.metrics import METRICS
from analysis.data.pairing import run_ratio
from analysis.data.stats import median_interval, median_intervals, percentile, spreads
from results_schema.atomic import write_text
from results_schema.files import SUMMARY

PERCENTILES = (50, 90, 99)


def summarise(run: Run) -> dict[str, Any]:
    """Compute a run's summary.

    The best baseline is the one with the highest median throughput among systems that are exact and not our own: a
    dropping system computes something else, and a bound is no system, so they are shown and never compared with.
    """
    values = run.values
    systems: dict[str, dict[str, Any]] = {
        name: _estimates(rows[[metric.name for metric in METRICS]])
        for name in run.systems
        if not (rows := values[values["system"] == name]).empty
    }
    for name, entry in systems.items():
        entry |= serving(run, name)
    best = best_baseline(run, systems)
    throughput = values[["system", "round", "throughput_tokens_per_s"]].set_index("round").sort_index()
    by_system = dict(iter(throughput.groupby("system")["throughput_tokens_per_s"]))
    for name, entry in systems.items():
        entry |= {key: run.systems[name][key] for key in ("exact", "baseline", "bound")}
        entry |= {"knows": known(run, name)}
        if best is not None:
            entry["throughput_ratio_to_best_baseline"] = asdict(run_ratio(run, by_system[name], by_system[best]))
    manifest = run.manifest
    return {
        **{key: manifest[key] for key in ("run_id", "experiment", "backend", "device", "scope", "world_size", "point")},
        "host_link": run.iterations["host_link"].iloc[0],
        "exchange": (manifest.get("exchange") or {"used": "collective"})["used"],
        "best_baseline": best,
        "systems": systems,
    }


def _estimates(values: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return what a summary says of every column that has a value."""
    samples = values.to_numpy(dtype=np.float64).T
    known = ~np.isnan(samples)
    found: dict[str, dict[str, float]] = {}
    # All that have a value of every round at once, then those that lack some.
    for chosen in (known.all(axis=1), *np.eye(len(samples), dtype=bool)[known.any(axis=1) & ~known.all(axis=1)]):
        of = np.ascontiguousarray(samples[chosen][:, known[chosen].all(axis=0)])
        for name, estimate, spread in zip(values.columns[chosen], median_intervals(of), spreads(of), strict=True):
            found[name] = vars(estimate) | spread
    return {name: found[name] for name in values if name in found}


def known(run: Run, system: str) -> str | None:
    """Return what a system may see of the routing, separated by commas; None for runs of earlier versions."""
    knows = run.systems[system].get("knows")
    return None if knows is None else ", ".join(knows)


def serving(run: Run, system: str) -> dict[str, Any]:
    """Return percentiles of the time to first token over requests, and figures of the decode phase, where measured.

    A percentile is taken over the requests of all rounds, and missing where they are too few for it. Of the open loop
    they are there where it had one rate; `analysis.data.serving` has those of several.
    """
    found: dict[str, Any] = {}
    if run.requests is not None:
        for loop, rows in run.requests[run.requests["system"] == system].groupby("loop"):
            if rows["rate_per_s"].nunique() > 1:
                continue
            prefix = "" if loop == "closed" else f"{loop}_loop_"
            for percent in PERCENTILES:
                if (estimate := percentile(rows["ttft_s"], percent)) is not None:
                    found[f"{prefix}ttft_p{percent}_s"] = asdict(estimate)
            if loop == "open":
                found["open_loop_queue_s"] = asdict(median_interval(rows.groupby("round")["queue_s"].mean()))
    if run.decode is not None:
        rows = run.decode[run.decode["system"] == system]
        found |= {name: asdict(median_interval(rows[name])) for name in ("tpot_s", "output_tokens_per_s")}
    return found


def best_baseline(run: Run, systems: dict[str, Any]) -> str | None:
    """Return the exact baseline, no bound, with the highest median throughput, or None where there is none."""
    kinds = {n: run.systems[n] for n in systems}
    candidates = [n for n, kind in kinds.items() if kind["exact"] and kind["baseline"] and not kind["bound"]]
    return max(candidates, key=lambda n: systems[n]["throughput_tokens_per_s"]["median"], default=None)


def write_summary(run: Run) -> dict[str, Any]:
    """Compute a run's summary, store it in one step unless the same is there already, and return it."""
    summary = summarise(run)
    text = json.dumps(summary, indent=2) + "\n"
    target = run.folder / SUMMARY
    if not target.exists() or target.read_bytes() != text.encode():
        write_text(target, text)
    return summary
