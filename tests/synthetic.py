"""Result folders in the schema of docs/metrics.md with numbers that a test knows, made without the runtime."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml
from pyarrow import parquet

from results_schema.tables import PHASES

WORLD_SIZE, NUM_LAYERS, INPUT_TOKENS = 2, 3, 1000


@dataclass(frozen=True)
class Synthetic:
    """A run that was written, with the rows that went into its tables."""

    folder: Path
    layers: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)

    def layer_rows(self, iteration: int) -> list[dict[str, Any]]:
        return [row for row in self.layers if row["iteration"] == iteration]


KINDS = {
    "harmoeny": {"exact": True, "baseline": False, "bound": False},
    "static_ep": {"exact": True, "baseline": True, "bound": False},
    "even_split": {"exact": True, "baseline": True, "bound": False},
    "drop": {"exact": False, "baseline": True, "bound": False},
    "ideal": {"exact": True, "baseline": True, "bound": True},
}
#: Latency in seconds by system and round: HarMoEny takes half of static EP's; drop is the fastest, then the bound.
LATENCY_S = {
    "harmoeny": [0.5, 1.0, 1.5, 2.0, 4.0],
    "static_ep": [1.0, 2.0, 3.0, 4.0, 8.0],
    "even_split": [2.0, 2.5, 4.0, 5.0, 8.5],
    "drop": [0.25, 0.25, 0.25, 0.25, 0.25],
    "ideal": [0.375, 0.5, 1.0, 1.25, 2.0],
}


def write_run(
    folder: Path,
    *,
    latency_s: Mapping[str, Sequence[float]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    skew: float = 0.9,
    seed: int = 0,
    predicts: Collection[str] = (),
    restore_s: float = 1e-4,
) -> Synthetic:
    """Write a finished run; all numbers but the latencies are drawn with ``seed``.

    Systems that predict say 0.8 of what the layer takes on the rank, but nothing in layer 0.

    A system's policy is the longest of :data:`KINDS` that its name begins with, else static EP; ``options`` of the
    policies by system. Restores of a layer take up to ``restore_s``, by default too little to count.
    """
    latency_s = latency_s or LATENCY_S
    folder.mkdir(parents=True, exist_ok=True)
    run = Synthetic(folder)
    rng = random.Random(seed)
    platform = {"backend": "gloo", "device": "CPU of tests", "host_link": "memcpy"}
    for round_index in range(len(next(iter(latency_s.values())))):
        for system in latency_s:
            keys = {"system": system, "round": round_index, "iteration": len(run.iterations)}
            for layer in range(NUM_LAYERS):
                rows: list[dict[str, Any]] = [
                    keys
                    | platform
                    | {"layer": layer, "rank": rank}
                    | _layer(rng, exact=KINDS[_policy(system)]["exact"], restore_s=restore_s)
                    for rank in range(WORLD_SIZE)
                ]
                if system in predicts and layer > 0:
                    for row in rows:
                        row["predicted_s"] = 0.8 * (row["dispatch_s"] + row["compute_s"] + row["combine_s"])
                run.layers.extend(rows)
            latency = latency_s[system][round_index]
            run.iterations.append(
                keys
                | platform
                | {
                    "scope": "model",
                    "world_size": WORLD_SIZE,
                    "num_sequences": 10,
                    "input_tokens": INPUT_TOKENS,
                    "latency_s": latency,
                    "ttft_s": 0.75 * latency,
                    "throughput_tokens_per_s": INPUT_TOKENS
                    / max(latency, _restoring_s(run.layer_rows(len(run.iterations)))),
                    "drain_s": rng.random(),
                }
            )
    for table in ("layers", "iterations"):
        parquet.write_table(pa.Table.from_pylist(getattr(run, table)), folder / f"{table}.parquet")
    config = {
        "router": {"_target_": "x.SkewRouter", "skew": skew, "num_hot": 1},
        "systems": {name: {"_target_": "x", **(options or {}).get(name, {})} for name in latency_s},
        "wandb": {"project": "tests"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps(_manifest(folder.name, list(latency_s), skew, options or {})))
    return run


def write_routing(folder: Path, counts: Sequence[Sequence[Sequence[int]]], stacks: Sequence[int], router: str) -> None:
    """Add the routing of a run: ``counts[round][layer][expert]``, decided by ``router``."""
    rows = [
        {"round": index, "layer": layer, "stack": stacks[layer], "counts": values}
        for index, layers in enumerate(counts)
        for layer, values in enumerate(layers)
    ]
    pd.DataFrame(rows).to_parquet(folder / "routing.parquet", index=False)
    change_manifest(folder, point={"router": router})


def change_platform(folder: Path, backend: str, device: str) -> None:
    """Let a run be another machine's."""
    for path in folder.glob("*.parquet"):
        frame = pd.read_parquet(path)
        if "backend" in frame:
            frame.assign(backend=backend, device=device).to_parquet(path, index=False)
    change_manifest(folder, backend=backend, device=device)


def write_serving(folder: Path, systems: Sequence[str], num_rounds: int) -> None:
    """Add the open loop and the decode phase to a run.

    In round r the k-th of 11 requests has a TTFT of ``r + 1 + k / 10`` s in the closed loop, and twice that in the open
    one, of which it waits half.
    """
    platform = {"backend": "gloo", "device": "CPU of tests", "host_link": "memcpy"}
    requests = [
        platform
        | {"system": system, "round": r, "batch": 0, "request": k, "rank": 0, "input_tokens": 8, "loop": loop}
        | {"arrival_s": 0.0, "start_s": wait * ttft_s, "first_token_s": factor * ttft_s}
        | {"queue_s": wait * ttft_s, "ttft_s": factor * ttft_s}
        for system in systems
        for loop, factor, wait in (("closed", 1.0, 0.0), ("open", 2.0, 1.0))
        for r in range(num_rounds)
        for k in range(11)
        for ttft_s in [r + 1 + k / 10]
    ]
    decode = [
        platform
        | {"system": system, "round": r, "world_size": WORLD_SIZE, "num_sequences": 10, "output_tokens": 50}
        | {"decode_s": 5.0 * (r + 1), "tpot_s": 1.0 * (r + 1), "output_tokens_per_s": 10 / (r + 1)}
        | {"executed_tokens": 400, "host_tokens": 100, "num_active_experts": 80, "num_misses": 20}
        | {"fetch_bytes": 1 << 20, "activation_bytes": 1 << 16, "fetch_s": 0.5, "fetch_wait_s": 0.25}
        for system in systems
        for r in range(num_rounds)
    ]
    pd.DataFrame(requests).to_parquet(folder / "requests.parquet", index=False)
    pd.DataFrame(decode).to_parquet(folder / "decode.parquet", index=False)


def write_rates(folder: Path, ttft_s: Mapping[tuple[str, float], Sequence[float]], num_rounds: int = 2) -> None:
    """Add an open loop to a run: times to first token by system and rate, of requests that arrive a second apart.

    Every request gets two more tokens, 0.25 and 0.75 s after the ones before; round r takes r times as long as round 0
    until its first request arrives.
    """
    platform = {"backend": "gloo", "device": "CPU of tests", "host_link": "memcpy"}
    rows = [
        platform
        | {"system": system, "round": r, "batch": k, "request": k, "rank": k % WORLD_SIZE, "input_tokens": 8}
        | {"arrival_s": 1.0 + r + k, "start_s": 1.0 + r + k, "first_token_s": 1.0 + r + k + ttft, "loop": "open"}
        | {"queue_s": 0.0, "ttft_s": ttft, "rate_per_s": rate, "output_tokens": 3, "decode_s": 1.0, "tpot_s": 0.5}
        | {"itl_s": [0.25, 0.75]}
        for (system, rate), times in ttft_s.items()
        for r in range(num_rounds)
        for k, ttft in enumerate(times)
    ]
    pd.DataFrame(rows).to_parquet(folder / "requests.parquet", index=False)


def change_config(folder: Path, **changes: Any) -> None:
    """Overwrite groups of a run's configuration."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def write_sweep(results: Path, skews: Sequence[float]) -> Path:
    """Write a sweep over skews with a run each, and return the sweep's folder."""
    run_ids = [f"skew={skew}" for skew in skews]
    for run_id, skew in zip(run_ids, skews, strict=True):
        slower = {name: [(1 + skew) * s for s in seconds] for name, seconds in LATENCY_S.items()}
        write_run(results / run_id, latency_s=slower, skew=skew)
    folder = results / "sweeps" / "0123abcd"
    folder.mkdir(parents=True)
    content = {
        "sweep_id": folder.name,
        "experiment": "skew_sweep",
        "axes": ["router.skew"],
        "run_ids": run_ids,
        "values": [{"router.skew": skew} for skew in skews],
    }
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    """Overwrite fields of a run's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def _layer(rng: random.Random, *, exact: bool, restore_s: float) -> dict[str, Any]:
    times = {f"{phase}_s": rng.random() for phase in PHASES}
    fetch_s = rng.choice([0.0, rng.random()])
    return times | {
        "num_assignments": 500,
        "executed_tokens": rng.randint(100, 900),
        "sent_tokens": rng.randint(0, 500),
        "dropped_tokens": 0 if exact else rng.randint(1, 400),
        "padded_tokens": rng.choice([0, rng.randint(1, 900)]),
        "num_active_experts": rng.randint(1, 8),
        "num_host_fetches": rng.randint(0, 3),
        "num_peer_fetches": (from_peers := rng.randint(0, 3)),
        "num_restores": rng.randint(0, 3),
        "num_halved_fetches": rng.randint(0, from_peers),
        "num_ahead": (ahead := rng.randint(0, 3)),
        "num_ahead_used": rng.randint(0, ahead),
        "fetch_bytes": rng.randint(0, 1 << 20),
        "fetch_s": fetch_s,
        "fetch_wait_s": rng.random() * fetch_s,
        "restore_s": rng.random() * restore_s,
        "restore_wait_s": rng.random() * 0.1,
        "layer_s": sum(times.values()),
        "idle_s": rng.random() * 0.1,
        "predicted_s": 0.0,
        "host_tokens": rng.randint(0, 100),
        "activation_bytes": rng.randint(0, 1 << 20),
        "num_misses": rng.randint(0, 1),
        "host_s": rng.random() * 0.1,
        "host_wait_s": rng.random() * 0.1,
    }


def _restoring_s(layers: list[dict[str, Any]]) -> float:
    """Return how long the busiest rank's link restores."""
    return float(max(sum(row["restore_s"] for row in layers if row["rank"] == rank) for rank in range(WORLD_SIZE)))


def _policy(system: str) -> str:
    return max((name for name in KINDS if system.startswith(name)), key=len, default="static_ep")


def _manifest(
    run_id: str, systems: Sequence[str], skew: float, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "experiment": "skew_sweep",
        "status": "finished",
        "backend": "gloo",
        "device": "CPU of tests",
        "scope": "model",
        "world_size": WORLD_SIZE,
        "point": {"router": "skew", "router.skew": skew, "router.num_hot": 1},
        "systems": {
            name: {"policy": _policy(name), "options": dict(options.get(name, {}))} | KINDS[_policy(name)]
            for name in systems
        },
        "model": {"name": "switch", "num_moe_layers": NUM_LAYERS, "num_experts": 8, "top_k": 1},
        "dataset": {"name": "pydoc"},
    }
