"""The numbers of a summary once more, from the raw rows alone: plain loops by the formulas of docs/metrics.md."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import pyarrow.parquet as pq

from results_schema.files import SUMMARY
from results_schema.tables import ITERATIONS, LAYERS, PHASES, REQUESTS

Row = dict[str, Any]


def differences(folder: Path) -> Iterator[str]:
    """Yield what a finished run's summary, or one of its tables, says otherwise than the rows do."""
    layers, iterations = _rows(folder / LAYERS.file), _rows(folder / ITERATIONS.file)
    yield from _impossible(layers, iterations)
    if (path := folder / REQUESTS.file).exists():
        yield from _unlike_requests(_rows(path), iterations)
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (OSError, ValueError) as error:
        yield f"{SUMMARY} cannot be read ({error})"
        return
    found = {name: _numbers(name, layers, iterations) for name in {row["system"] for row in iterations}}
    if set(found) != set(summary["systems"]):
        yield f"systems: {sorted(summary['systems'])}, in the rows {sorted(found)}"
        return
    baseline = found[summary["best_baseline"]]["throughput_tokens_per_s"]
    for system, numbers in found.items():
        numbers["throughput_ratio_to_best_baseline"] = [
            own / other for own, other in zip(numbers["throughput_tokens_per_s"], baseline, strict=True)
        ]
        for name, values in numbers.items():
            said = summary["systems"][system][name]
            if not math.isclose(said["median"], median(values), rel_tol=1e-9, abs_tol=1e-12) or said["n"] != len(
                values
            ):
                yield f"{system}: {name} is {said}, of the rows {median(values)} (n={len(values)})"


def _rows(path: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(path, partitioning=None).to_pylist()
    return rows


def _impossible(layers: Sequence[Row], iterations: Sequence[Row]) -> Iterator[str]:
    for row in iterations:
        where = f"iteration {row['iteration']} of {row['system']}"
        if not 0 < row["latency_s"] < 60:
            yield f"{where}: a latency of {row['latency_s']} s"
        own = [r for r in layers if r["iteration"] == row["iteration"]]
        links = [sum(r["restore_s"] for r in own if r["rank"] == rank) for rank in {r["rank"] for r in own}]
        taken_s = max(row["latency_s"], *links)
        if not math.isclose(row["throughput_tokens_per_s"] * taken_s, row["input_tokens"], rel_tol=1e-9):
            yield f"{where}: throughput x what the batch takes is not its tokens"
        executed, wanted = (sum(r[name] for r in own) for name in ("executed_tokens", "num_assignments"))
        if executed != wanted:
            yield f"{where}: {executed} of {wanted} assignments executed"
    for row in layers:
        for name, value in row.items():
            if name.endswith("_s") and not 0 <= value < 60:
                yield f"iteration {row['iteration']}, layer {row['layer']}, rank {row['rank']}: {name} is {value}"


def _unlike_requests(requests: Sequence[Row], iterations: Sequence[Row]) -> Iterator[str]:
    for row in iterations:
        own = [r["ttft_s"] for r in requests if (r["system"], r["round"]) == (row["system"], row["round"])]
        if len(own) != row["num_sequences"] or not math.isclose(mean(own), row["ttft_s"], rel_tol=1e-9):
            yield f"iteration {row['iteration']}: ttft_s is {row['ttft_s']}, of its requests {own}"


def _numbers(system: str, layers: Sequence[Row], iterations: Sequence[Row]) -> dict[str, list[float]]:
    """Return every metric of a system by round."""
    numbers: dict[str, list[float]] = {}
    for iteration in sorted((r for r in iterations if r["system"] == system), key=lambda r: int(r["round"])):
        rows = [row for row in layers if row["iteration"] == iteration["iteration"]]
        for name, value in {**_of_iteration(iteration), **_of_layers(rows)}.items():
            numbers.setdefault(name, []).append(value)
    return numbers


def _of_iteration(row: Row) -> dict[str, float]:
    return {name: row[name] for name in ("throughput_tokens_per_s", "ttft_s", "latency_s", "drain_s")}


def _of_layers(rows: Sequence[Row]) -> dict[str, float]:
    def total(*names: str) -> float:
        return float(sum(row[name] for row in rows for name in names))

    ranks = {row["rank"] for row in rows}
    by_layer = [[row["executed_tokens"] for row in rows if row["layer"] == i] for i in {row["layer"] for row in rows}]
    fetch_s = total("fetch_s")
    return {
        "idle_share": total("idle_s") / total("layer_s"),
        "imbalance": sum(map(max, by_layer)) / sum(map(mean, by_layer)),
        "num_fetches": total("num_host_fetches", "num_peer_fetches"),
        "num_restores": total("num_restores"),
        "fetch_hidden_share": max(0.0, 1 - total("fetch_wait_s") / fetch_s) if fetch_s else 1.0,
        "fetch_wait_share": total("fetch_wait_s") / total("layer_s"),
        "dropped_share": total("dropped_tokens") / total("num_assignments"),
        "padding_factor": 1 + total("padded_tokens") / total("executed_tokens"),
        **{f"{phase}_s": total(f"{phase}_s") / len(ranks) for phase in PHASES},
    }
