"""The tables of a run: files and columns in the order in which they are written; docs/metrics.md defines them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from results_schema.manifest import SIMULATOR

#: Phases of a MoE layer in their order.
PHASES = ("route", "metadata", "plan", "dispatch", "compute", "combine")

DType = Literal["str", "int64", "float64", "list[int64]", "list[float64]"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its name.
        dtype: of its values.
        unit: empty for names, indices, ratios and numbers of events.
        values: all that may stand there; empty where anything may.
        added: what it is in runs of earlier revisions, which lack it; None: all have it.
    """

    name: str
    dtype: DType
    unit: str = ""
    values: tuple[str, ...] = ()
    added: float | tuple[()] | None = None


@dataclass(frozen=True)
class Table:
    """A table, stored as Parquet.

    Attributes:
        name: its name, of which its file's is made.
        columns: in the order in which they are written.
        always: whether every run has it.
    """

    name: str
    columns: tuple[Column, ...]
    always: bool = False

    @property
    def file(self) -> str:
        """The name of its file in the run's folder."""
        return f"{self.name}.parquet"

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names of its columns."""
        return tuple(column.name for column in self.columns)


def _numbers(*names: str, unit: str = "") -> tuple[Column, ...]:
    return tuple(Column(name, "int64", unit) for name in names)


def _added(*names: str, unit: str = "", added: float = 0) -> tuple[Column, ...]:
    return tuple(Column(name, "int64", unit, added=added) for name in names)


def _seconds(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "float64", "s") for name in names)


_SYSTEM = Column("system", "str")
_PLATFORM = (
    Column("backend", "str", values=("gloo", "nccl", SIMULATOR)),
    Column("device", "str"),
    Column("host_link", "str", values=("memcpy", "emulated", "cuda", "simulated")),
)

LAYERS = Table(
    "layers",
    (
        _SYSTEM,
        *_numbers("round", "iteration", "layer", "rank", "num_assignments"),
        *_numbers("executed_tokens", "sent_tokens", "dropped_tokens", "padded_tokens", unit="tokens"),
        *_numbers("num_active_experts", "num_host_fetches", "num_peer_fetches", "num_restores"),
        *(Column(name, "int64", added=0) for name in ("num_halved_fetches", "num_ahead", "num_ahead_used")),
        *_numbers("fetch_bytes", unit="bytes"),
        *_seconds("fetch_s", "fetch_wait_s", "restore_s", "restore_wait_s"),
        *_seconds(*(f"{phase}_s" for phase in PHASES)),
        *_seconds("layer_s"),
        Column("predicted_s", "float64", "s", added=0.0),
        *_added("host_tokens", unit="tokens"),
        *_added("activation_bytes", unit="bytes"),
        *_added("num_misses", added=math.nan),
        Column("host_s", "float64", "s", added=0.0),
        Column("host_wait_s", "float64", "s", added=0.0),
        *_seconds("idle_s"),
        *_PLATFORM,
    ),
    always=True,
)
ITERATIONS = Table(
    "iterations",
    (
        _SYSTEM,
        *_numbers("round", "iteration"),
        Column("scope", "str", values=("model", "layer")),
        *_PLATFORM,
        *_numbers("world_size", "num_sequences"),
        *_numbers("input_tokens", unit="tokens"),
        *_seconds("latency_s", "ttft_s"),
        Column("throughput_tokens_per_s", "float64", "tokens/s"),
        *_seconds("drain_s"),
    ),
    always=True,
)
ROUTING = Table("routing", (*_numbers("round", "layer", "stack"), Column("counts", "list[int64]")))
REQUESTS = Table(
    "requests",
    (
        _SYSTEM,
        *_numbers("round", "batch", "request", "rank"),
        *_numbers("input_tokens", unit="tokens"),
        *_seconds("arrival_s", "start_s", "first_token_s"),
        Column("loop", "str", values=("closed", "open")),
        *_seconds("queue_s", "ttft_s"),
        Column("rate_per_s", "float64", "1/s", added=0.0),
        Column("output_tokens", "int64", "tokens", added=1),
        Column("decode_s", "float64", "s", added=0.0),
        Column("tpot_s", "float64", "s", added=0.0),
        Column("itl_s", "list[float64]", "s", added=()),
        *_PLATFORM,
    ),
)
DECODE = Table(
    "decode",
    (
        _SYSTEM,
        *_numbers("round"),
        *_PLATFORM,
        *_numbers("world_size", "num_sequences"),
        *_numbers("output_tokens", unit="tokens"),
        *_seconds("decode_s", "tpot_s"),
        Column("output_tokens_per_s", "float64", "tokens/s"),
        *_added("executed_tokens", "host_tokens", unit="tokens"),
        *_added("num_active_experts", "num_misses"),
        *_added("fetch_bytes", "activation_bytes", unit="bytes"),
        Column("fetch_s", "float64", "s", added=0.0),
        Column("fetch_wait_s", "float64", "s", added=0.0),
    ),
)
YARDSTICK = Table(
    "yardstick",
    (*_numbers("round", "moment", "rank"), *_seconds("product_s", "copy_s"), *_PLATFORM),
)
TABLES = (LAYERS, ITERATIONS, ROUTING, REQUESTS, DECODE, YARDSTICK)
