"""The one table of derived metrics: name, title, unit and direction, with the formula and the function of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pandas as pd

from results_schema.tables import PHASES

if TYPE_CHECKING:
    from pandas.api.typing import DataFrameGroupBy


@dataclass(frozen=True)
class Quantity:
    """A number of a system that tables and figures show.

    Attributes:
        name: its column.
        title: its name for people.
        unit: empty for ratios and numbers of events.
        better: direction in which it is better.
        short: its name in a table's head; empty: the title.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    short: str = field(default="", kw_only=True)

    @property
    def heading(self) -> str:
        """Its name in a table's head."""
        return self.short or self.title


@dataclass(frozen=True)
class Rows:
    """A run's rows, grouped once for all metrics: to group them takes most of a metric's time.

    Attributes:
        layers: rows of ``layers.parquet``.
        iterations: rows of ``iterations.parquet``, indexed by iteration.
    """

    layers: pd.DataFrame
    iterations: pd.DataFrame

    @cached_property
    def by_iteration(self) -> DataFrameGroupBy[Any, Any]:
        """The rows of ``layers`` by iteration."""
        return self.layers.groupby("iteration")

    @cached_property
    def by_layer(self) -> DataFrameGroupBy[Any, Any]:
        """The rows of ``layers`` by iteration and layer, which is one per rank."""
        return self.layers.groupby(["iteration", "layer"])

    @cached_property
    def sums(self) -> pd.DataFrame:
        """Sums over layers and ranks by iteration."""
        return self.by_iteration[list(_SUMMED)].sum()

    @cached_property
    def phases(self) -> pd.DataFrame:
        """Means over ranks of the sums over layers of every phase, by iteration."""
        names = [f"{phase}_s" for phase in PHASES]
        return self.layers.groupby(["iteration", "rank"])[names].sum().groupby("iteration").mean()


_SUMMED = (
    "idle_s", "layer_s", "sent_tokens", "num_host_fetches", "num_peer_fetches", "num_restores", "num_ahead_used",
    "num_ahead", "fetch_wait_s", "fetch_s", "dropped_tokens", "num_assignments", "padded_tokens", "executed_tokens",
    "host_tokens",
)  # fmt: skip
Compute: TypeAlias = Callable[[Rows], pd.Series]


@dataclass(frozen=True)
class Metric(Quantity):
    """A quantity that every iteration has.

    Attributes:
        formula: over the columns of docs/metrics.md.
        compute: from a run's rows to a series indexed by iteration.
    """

    formula: str
    compute: Compute


def _column(name: str) -> Compute:
    return lambda rows: rows.iterations[name]


def _hit_share(rows: Rows) -> pd.Series:
    sums = rows.by_iteration[["num_misses", "num_active_experts"]].sum(min_count=1)
    # A share of 0 / 0 is 0, but what was not recorded stays unknown.
    misses = sums["num_misses"] / sums["num_active_experts"].clip(lower=1)
    return 1 - misses


def _share(part: str, whole: str) -> Compute:
    return lambda rows: (rows.sums[part] / rows.sums[whole]).fillna(0.0)


def _total(*names: str) -> Compute:
    return lambda rows: rows.sums[list(names)].sum(axis=1)


def _hidden(rows: Rows) -> pd.Series:
    """Share of the fetches' time that no computation waited for."""
    sums = rows.sums
    # Waking the computation up takes time too, which for tiny experts is more than the fetch; and weights that a new
    # placement moves are waited for and are no fetches.
    hidden = (1 - sums["fetch_wait_s"] / sums["fetch_s"]).clip(lower=0.0)
    return hidden.where(sums["fetch_s"] > 0, 1.0)


def _per_rank(name: str) -> Compute:
    return lambda rows: rows.phases[name]


def _imbalance(rows: Rows) -> pd.Series:
    """Imbalance over all layers, every layer weighted by its tokens."""
    of_ranks = rows.by_layer["executed_tokens"]
    largest, mean = (of_layers.groupby("iteration").sum() for of_layers in (of_ranks.max(), of_ranks.mean()))
    return (largest / mean).fillna(1.0)


def _by_layer(column: str) -> Compute:
    """Largest over mean of the ranks in every layer, then the mean over layers; 1 where there is nothing."""

    def compute(rows: Rows) -> pd.Series:
        of_ranks = rows.by_layer[column]
        return (of_ranks.max() / of_ranks.mean()).fillna(1.0).groupby("iteration").mean()

    return compute


def _exposed_plan(rows: Rows) -> pd.Series:
    return rows.by_layer["plan_s"].max().groupby("iteration").sum()


def _exposed_bytes(rows: Rows) -> pd.Series:
    layers = rows.layers
    waiting = (layers["fetch_wait_s"] / layers["fetch_s"]).fillna(0.0).clip(upper=1.0)
    return (layers["fetch_bytes"] * waiting).groupby(layers["iteration"]).sum()


def _prediction_error(rows: Rows) -> pd.Series:
    layers = rows.layers
    taken_s = layers[["dispatch_s", "compute_s", "combine_s"]].sum(axis=1)
    slowest = layers.assign(taken_s=taken_s).groupby(["iteration", "layer"])[["taken_s", "predicted_s"]].max()
    error = (slowest["taken_s"] / slowest["predicted_s"] - 1).abs().where(slowest["predicted_s"] > 0)
    return error.groupby("iteration").mean()


def _ahead_hits(rows: Rows) -> pd.Series:
    return (rows.sums["num_ahead_used"] / rows.sums["num_ahead"]).where(rows.sums["num_ahead"] > 0)


METRICS = (
    Metric(
        "throughput_tokens_per_s", "Throughput", "tokens/s", "higher",
        "input_tokens / max(latency_s, max over ranks of the sum of restore_s over layers)",
        _column("throughput_tokens_per_s"),
    ),
    Metric("ttft_s", "Time to first token", "s", "lower", "mean over sequences of f_r - b", _column("ttft_s"),
           short="TTFT"),
    Metric("latency_s", "Latency", "s", "lower", "max over ranks(f_r) - b", _column("latency_s")),
    Metric(
        "idle_share", "Idle share of the MoE layers", "", "lower",
        "sum of idle_s / sum of layer_s, over layers and ranks", _share("idle_s", "layer_s"),
        short="Idle share",
    ),
    Metric(
        "imbalance", "Imbalance", "", "lower",
        "sum over layers of max over ranks(executed_tokens) / sum over layers of mean over ranks(executed_tokens)",
        _imbalance,
    ),
    Metric(
        "layer_imbalance", "Imbalance by layer", "", "lower",
        "mean over layers of max over ranks(executed_tokens) / mean over ranks(executed_tokens); 1 where nothing is "
        "executed",
        _by_layer("executed_tokens"),
    ),
    Metric(
        "active_expert_imbalance", "Imbalance of activated experts", "", "lower",
        "mean over layers of max over ranks(num_active_experts) / mean over ranks(num_active_experts); 1 where none is "
        "active",
        _by_layer("num_active_experts"),
    ),
    Metric(
        "exposed_plan_s", "Planning on the critical path", "s", "lower",
        "sum over layers of max over ranks(plan_s)", _exposed_plan,
    ),
    Metric(
        "exposed_fetch_bytes", "Weights on the critical path", "bytes", "lower",
        "sum of fetch_bytes * fetch_wait_s / fetch_s over layers and ranks, the share at most 1: what was moved while "
        "computation stood still for it",
        _exposed_bytes,
    ),
    Metric(
        "exchanged_tokens", "Tokens between ranks", "tokens", "lower",
        "sum of sent_tokens over layers and ranks", _total("sent_tokens"),
    ),
    Metric(
        "num_fetches", "Fetches per batch", "", "lower",
        "sum of num_host_fetches + num_peer_fetches over layers and ranks",
        _total("num_host_fetches", "num_peer_fetches"), short="Fetches",
    ),
    Metric(
        "num_restores", "Restores per batch", "", "lower",
        "sum of num_restores over layers and ranks", _total("num_restores"),
    ),
    Metric(
        "ahead_hit_rate", "Hit rate of looking ahead", "", "higher",
        "sum of num_ahead_used / sum of num_ahead over layers and ranks; none where nothing was copied ahead",
        _ahead_hits,
    ),
    Metric(
        "fetch_hidden_share", "Share of fetch time hidden", "", "higher",
        "1 - sum of fetch_wait_s / sum of fetch_s over layers and ranks, at least 0; 1 where nothing is fetched",
        _hidden,
    ),
    Metric(
        "drain_s", "Drain time", "s", "lower",
        "max over ranks of time from f_r to the end of the last restore", _column("drain_s"),
    ),
    Metric(
        "fetch_wait_share", "Waiting for weights", "", "lower",
        "sum of fetch_wait_s / sum of layer_s, over layers and ranks", _share("fetch_wait_s", "layer_s"),
    ),
    Metric(
        "dropped_share", "Dropped", "", "lower",
        "sum of dropped_tokens / sum of num_assignments, over layers and ranks",
        _share("dropped_tokens", "num_assignments"),
    ),
    Metric(
        "padding_factor", "Padding", "", "lower",
        "1 + sum of padded_tokens / sum of executed_tokens, over layers and ranks",
        lambda rows: 1 + _share("padded_tokens", "executed_tokens")(rows),
    ),
    Metric(
        "hit_share", "Experts that were in a slot", "", "higher",
        "1 - sum of num_misses / sum of num_active_experts, over layers and ranks; 1 where none is active, none in "
        "runs of earlier revisions",
        _hit_share,
        short="Hits",
    ),
    Metric(
        "host_share", "Assignments executed on hosts", "", "higher",
        "sum of host_tokens / sum of executed_tokens, over layers and ranks", _share("host_tokens", "executed_tokens"),
        short="On hosts",
    ),
    Metric(
        "prediction_error", "Error of the predicted time", "", "lower",
        "mean over layers with a predicted_s above 0 of the absolute value of max over ranks(dispatch_s + compute_s + "
        "combine_s) / predicted_s - 1; none where nothing is predicted",
        _prediction_error,
    ),
    *(
        Metric(
            f"{phase}_s", phase.capitalize(), "s", "lower",
            f"mean over ranks of the sum over layers of {phase}_s", _per_rank(f"{phase}_s"),
        )
        for phase in PHASES
    ),
)  # fmt: skip

#: What summaries and figures derive from these, or from requests and the decode phase.
DERIVED = (
    Quantity(
        "throughput_ratio_to_best_baseline", "Throughput to the best baseline", "", "higher",
        short="Throughput to best baseline",
    ),
    Quantity(
        "throughput_ratio_to_no_skew", "Throughput to the best system's at no skew", "", "higher",
        short="Throughput to best at no skew",
    ),
    Quantity("throughput_relative", "Throughput / Static EP's", "", "higher"),
    Quantity("throughput_to_best_threshold", "Throughput / the best threshold's", "", "higher"),
    Quantity("ttft_ms_per_sequence", "Time to first token", "ms per sequence", "lower"),
    *(
        Quantity(
            f"{loop}ttft_p{percent}_s", f"{told}ime to first token, {percent}th percentile", "s", "lower",
            short=f"{short}TTFT p{percent}",
        )
        for loop, told, short in (("", "T", ""), ("open_loop_", "Open loop, t", "Open loop "))
        for percent in (90, 99)
    ),
    Quantity("tpot_s", "Time per output token", "s", "lower"),
    Quantity("output_tokens_per_s", "Output throughput", "tokens/s", "higher"),
)  # fmt: skip
QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in (*METRICS, *DERIVED)}


def per_iteration(layers: pd.DataFrame, iterations: pd.DataFrame) -> pd.DataFrame:
    """Compute all metrics of a run.

    Args:
        layers: rows of ``layers.parquet``.
        iterations: rows of ``iterations.parquet``.

    Returns:
        One row per iteration: ``system``, ``round``, ``iteration`` and a column per metric, NaN where it has none.
    """
    rows = Rows(layers, iterations.set_index("iteration"))
    values = pd.DataFrame({metric.name: metric.compute(rows) for metric in METRICS})
    keys = rows.iterations[["system", "round"]]
    return keys.join(values).reset_index().sort_values("iteration", ignore_index=True)
