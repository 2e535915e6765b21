"""Reads result folders, and refuses what is unfinished or incomplete."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

LAYER_COLUMNS = (
    "system", "round", "iteration", "layer", "rank", "backend", "device", "host_link", "num_assignments",
    "executed_tokens", "sent_tokens", "dropped_tokens", "padded_tokens", "num_active_experts", "num_host_fetches",
    "num_peer_fetches",
    "num_restores", "fetch_bytes", "fetch_s", "fetch_wait_s", "restore_s", "restore_wait_s", "route_s", "metadata_s",
    "plan_s", "dispatch_s", "compute_s", "combine_s", "layer_s", "idle_s",
)  # fmt: skip
ITERATION_COLUMNS = (
    "system", "round", "iteration", "scope", "backend", "device", "host_link", "world_size", "num_sequences",
    "input_tokens", "latency_s", "ttft_s", "throughput_tokens_per_s", "drain_s",
)  # fmt: skip
REQUEST_COLUMNS = (
    "system", "round", "batch", "request", "rank", "input_tokens", "arrival_s", "start_s", "first_token_s", "loop",
    "queue_s", "ttft_s", "backend", "device", "host_link",
)  # fmt: skip
DECODE_COLUMNS = (
    "system", "round", "backend", "device", "host_link", "world_size", "num_sequences", "output_tokens", "decode_s",
    "tpot_s", "output_tokens_per_s",
)  # fmt: skip
ROUTING_COLUMNS = ("round", "layer", "stack", "counts")
#: What the analysis reads of a manifest; docs/metrics.md says what stands there.
MANIFEST_FIELDS = (
    "run_id", "experiment", "status", "backend", "device", "scope", "world_size", "point", "systems", "model",
    "dataset",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        manifest: what ran, where and on what.
        config: the resolved configuration.
        layers: rows as docs/metrics.md defines them.
        iterations: likewise.
        requests: likewise; None: not recorded, as by the simulator.
        decode: likewise; None: no decode phase was measured.
        routing: likewise; None: not recorded, as by earlier versions.
    """

    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    layers: pd.DataFrame
    iterations: pd.DataFrame
    requests: pd.DataFrame | None = None
    decode: pd.DataFrame | None = None
    routing: pd.DataFrame | None = None

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Systems by name, in the order of the configuration."""
        systems: dict[str, dict[str, Any]] = self.manifest["systems"]
        return systems


@dataclass(frozen=True)
class Sweep:
    """The finished runs of a sweep.

    Attributes:
        folder: the sweep's own folder.
        experiment: its experiment.
        runs: the finished runs, in the sweep's order.
        points: for each of them its values of the swept options, such as ``{"router.skew": 0.5}``.
        missing: ids of runs that are not finished.
    """

    folder: Path
    experiment: str
    runs: list[Run]
    points: list[dict[str, Any]]
    missing: list[str]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run's manifest.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable manifest.json ({error})") from error
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise ValueError(f"{folder}: manifest.json has no status")
    return manifest


def load_run(folder: Path) -> Run:
    """Load a finished run.

    Raises:
        ValueError: the run is unfinished, a file is missing or damaged, or a table lacks a column or rows.
    """
    manifest = read_manifest(folder)
    if manifest["status"] != "finished":
        raise ValueError(f"{folder}: status is {manifest['status']!r}, must be 'finished'")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        layers = pd.read_parquet(folder / "layers.parquet")
        iterations = pd.read_parquet(folder / "iterations.parquet")
        requests, decode, routing = (
            pd.read_parquet(path) if (path := folder / name).exists() else None
            for name in ("requests.parquet", "decode.parquet", "routing.parquet")
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: cannot be read ({error}); delete the folder and run it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.yaml: holds no configuration; delete the folder and run it again")
    run = Run(folder, manifest, config, layers, iterations, requests, decode, routing)
    _check_complete(run)
    return run


def _check_complete(run: Run) -> None:
    for name, there, wanted in (
        ("manifest.json: field", run.manifest, MANIFEST_FIELDS),
        ("layers.parquet: column", run.layers, LAYER_COLUMNS),
        ("iterations.parquet: column", run.iterations, ITERATION_COLUMNS),
        ("requests.parquet: column", run.requests, REQUEST_COLUMNS),
        ("decode.parquet: column", run.decode, DECODE_COLUMNS),
        ("routing.parquet: column", run.routing, ROUTING_COLUMNS),
    ):
        missing = [] if there is None else [key for key in wanted if key not in there]
        if missing:
            raise ValueError(f"{run.folder}/{name} {missing[0]!r} is missing")
    num_rounds = run.iterations["round"].nunique()
    per_iteration = run.manifest["model"]["num_moe_layers"] * run.manifest["world_size"]
    for name, found, expected in (
        ("iterations", len(run.iterations), len(run.systems) * num_rounds),
        ("layers", len(run.layers), len(run.iterations) * per_iteration),
    ):
        if found != expected or not expected:
            raise ValueError(f"{run.folder}/{name}.parquet: {found} rows, must be {expected or 'at least 1'}")


def find_runs(folder: Path) -> list[Run]:
    """Load all finished runs in or under a folder, by path.

    Raises:
        ValueError: a finished run is damaged.
    """
    return [load_run(run) for run in run_folders(folder) if is_finished(run)]


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs in or under a folder, finished or not, by path."""
    return sorted(path.parent for path in folder.rglob("manifest.json"))


def load_sweep(folder: Path) -> Sweep:
    """Load a sweep from the folder that holds its ``sweep.json``.

    Raises:
        ValueError: there is no readable ``sweep.json``, or a finished run is damaged.
    """
    try:
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        experiment, pairs = content["experiment"], list(zip(content["run_ids"], content["values"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no readable sweep.json ({error})") from error
    sweep = Sweep(folder, experiment, [], [], [])
    for run_id, values in pairs:
        path = folder.parent.parent / run_id
        if is_finished(path):
            sweep.runs.append(load_run(path))
            sweep.points.append(values)
        else:
            sweep.missing.append(run_id)
    return sweep


def is_finished(folder: Path) -> bool:
    """Tell whether a run came to its end; one with a damaged manifest did not, and is run again by its sweep."""
    try:
        return bool(read_manifest(folder)["status"] == "finished")
    except ValueError:
        return False
