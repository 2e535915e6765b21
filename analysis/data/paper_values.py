"""What the paper published (results/published): read and checked, and told apart by what our runs may stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.data.load import Run
from results_schema.tables import PHASES

FOLDER = Path(__file__).resolve().parents[2] / "results" / "published"
CITATION = "arXiv 2506.12417, 8 x V100"
WORLD_SIZE = 8
SEQ_LEN = 1024
#: Switch-Base-128 as the authors ran it; an expert of it in FP32 has 768 x 3072 x 2 weights.
_MODEL = {"num_experts": 128, "num_moe_layers": 12, "top_k": 1, "expert_bytes": 768 * 3072 * 2 * 4}
_DEVICES = ("dgx1_v100", "V100")


@dataclass(frozen=True)
class _Schema:
    """What a file must hold.

    Attributes:
        file: its name.
        keys: columns that name a row.
        numbers: columns with numbers above 0.
        texts: further columns.
    """

    file: str
    keys: tuple[str, ...]
    numbers: tuple[str, ...]
    texts: tuple[str, ...] = ("model_name", "backend", "device", "source")


_RATES = ("batch_size", "num_sequences", "input_tokens", "throughput_tokens_per_s", "ttft_s", "num_batches")
_PHASES = tuple(f"{name}_s" for name in PHASES)
_SCHEMAS = {
    "claims": _Schema("claims.csv", ("claim",), (), ("metric", "change_low", "change_high", "versus", "source")),
    "skew": _Schema("switch128_skew.csv", ("system", "router.skew"), _RATES),
    "datasets": _Schema("switch128_datasets.csv", ("system", "dataset"), _RATES),
    "breakdown": _Schema(
        "switch128_breakdown.csv", ("system", "stack"), (*_PHASES, "layer_s", "idle_s", "compute_max_s")
    ),
    "threshold": _Schema("switch128_threshold.csv", ("system", "threshold"), ("duration_s",)),
    "timeline": _Schema(
        "switch128_timeline.csv", ("system", "gini_low"),
        ("gini_high", "num_batches", *(f"throughput_tokens_per_s{end}" for end in ("", "_min", "_max"))),
    ),
    "small_memory": _Schema(
        "small_memory.csv", ("paper", "measure", "hub_name", "variant"), ("value",), ("source",)
    ),
    "huang_expert_s": _Schema("huang_expert_s.csv", ("hub_name", "place", "threads"), ("seconds",), ("source",)),
    "huang_ways": _Schema("huang_ways.csv", ("ways", "indexes", "threads"), ("tokens_per_s",), ("source",)),
    "eps_moe_layers": _Schema("eps_moe_layers.csv", ("m", "num_stages"), ("layer_s",), ("source",)),
}  # fmt: skip
TABLES = tuple(_SCHEMAS)


def load_published(name: str, folder: Path = FOLDER) -> pd.DataFrame:
    """Read a table of published values; results/published/README.md says what each is.

    Args:
        name: one of :data:`TABLES`.
        folder: where the files are.

    Raises:
        ValueError: no such table, or a file that is missing or damaged; file, column and value are named.
    """
    if name not in _SCHEMAS:
        raise ValueError(f"published: {name!r}, must be one of {', '.join(TABLES)}")
    schema = _SCHEMAS[name]
    path = folder / schema.file
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for column in (*schema.keys, *schema.numbers, *schema.texts):
        if column not in frame:
            raise ValueError(f"{path}: column {column!r} is missing")
    if frame.empty or frame.duplicated(list(schema.keys)).any():
        raise ValueError(f"{path}: {len(frame)} rows, must be at least 1 and one per {' and '.join(schema.keys)}")
    for column in schema.numbers:
        values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=np.float64)
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            value = frame[column].tolist()[wrong.argmax()]
            raise ValueError(f"{path}: {column} is {value!r}, must be a number above 0")
    if frame["source"].isna().any():
        raise ValueError(f"{path}: a row has no source")
    return frame


def on_papers_machine(run: Run) -> bool:
    """Tell whether a run had the paper's model, sequence length and 8 GPUs, real or simulated.

    Only then may absolute numbers share an axis with published ones.
    """
    manifest = run.manifest
    return (
        manifest["world_size"] == WORLD_SIZE
        and any(name in manifest["device"] for name in _DEVICES)
        and all(manifest["model"].get(key) == value for key, value in _MODEL.items())
        and run.config.get("seq_len") == SEQ_LEN
    )


def router_is(run: Run, name: str, **options: Any) -> bool:
    """Tell whether a run's router is of a class, with these options."""
    router = run.config["router"]
    return str(router.get("_target_", "")).endswith(f".{name}") and options.items() <= router.items()


def with_batches(summary: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Add to a summary how many sequences a system had per batch, and what latency that is per sequence.

    Args:
        summary: with ``run_id``, ``system`` and ``ttft_s`` with its interval.
        runs: its runs.

    Returns:
        The rows with ``num_sequences`` (over all ranks) and ``ttft_ms_per_sequence`` with its interval: the time to
        first token over the sequences of the batch, which is how the paper reports it.
    """
    sizes = {
        (run.manifest["run_id"], str(system)): int(size)
        for run in runs
        for system, size in run.iterations.groupby("system")["num_sequences"].first().items()
    }
    keys = zip(summary["run_id"], summary["system"], strict=True)
    frame = summary.assign(num_sequences=[sizes[key] for key in keys])
    per_sequence = {
        f"ttft_ms_per_sequence{end}": frame[f"ttft_s{end}"] / frame["num_sequences"] * 1e3
        for end in ("", "_low", "_high")
    }
    return frame.assign(**per_sequence)


def beside(frame: pd.DataFrame, axis: str, table: pd.DataFrame, *, same_batch: bool) -> pd.DataFrame:
    """Return the published values for rows of a summary.

    Args:
        frame: rows as :func:`with_batches` returns them.
        axis: the column that both have beside ``system``.
        table: published rows.
        same_batch: only values for as many sequences as ours had.

    Returns:
        As many rows as match: ``axis``, ``system``, ``throughput_tokens_per_s``, ``ttft_s``, ``ttft_ms_per_sequence``.
    """
    keys = [axis, "system", *(["num_sequences"] if same_batch else [])]
    columns = dict.fromkeys([axis, "system", "num_sequences", "throughput_tokens_per_s", "ttft_s"])
    rows = frame[keys].drop_duplicates().merge(table[list(columns)], on=keys)
    return rows.assign(ttft_ms_per_sequence=rows["ttft_s"] / rows["num_sequences"] * 1e3)


def change_text(row: Mapping[Any, Any]) -> str:
    """Write a published change as the abstract does: ``+37 % to +70 %``, ``up to -84 %``."""
    ends = [row["change_low"], row["change_high"]]
    if row["change_low"] < 0:
        ends.reverse()
    known = [f"{end:+.0%}".replace("%", " %") for end in ends if not pd.isna(end)]
    return " to ".join(known) if len(known) > 1 else f"up to {known[0]}"
