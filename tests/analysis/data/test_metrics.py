from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.data.load import load_run
from analysis.data.metrics import METRICS, per_iteration
from results_schema.tables import PHASES
from tests import documented
from tests.synthetic import NUM_LAYERS, WORLD_SIZE, Synthetic, write_run

Row = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return write_run(tmp_path_factory.mktemp("runs") / "run", predicts={"harmoeny"}, restore_s=1.0)


@pytest.fixture(scope="module")
def computed(written: Synthetic) -> pd.DataFrame:
    run = load_run(written.folder)
    # The order of rows must not matter.
    return per_iteration(run.layers.sample(frac=1, random_state=1), run.iterations.sample(frac=1, random_state=2))


def column(name: str) -> Callable[[list[Row], Row], float]:
    return lambda _, iteration: iteration[name]


def share(part: str, whole: str) -> Callable[[list[Row], Row], float]:
    return lambda layers, _: sum(row[part] for row in layers) / sum(row[whole] for row in layers)


def per_rank(name: str) -> Callable[[list[Row], Row], float]:
    return lambda layers, _: sum(row[name] for row in layers) / WORLD_SIZE


def imbalance(layers: list[Row], _: Row) -> float:
    largest = mean = 0.0
    for layer in range(NUM_LAYERS):
        loads = [row["executed_tokens"] for row in layers if row["layer"] == layer]
        assert len(loads) == WORLD_SIZE
        largest += max(loads)
        mean += sum(loads) / WORLD_SIZE
    return largest / mean


def hidden(layers: list[Row], _: Row) -> float:
    waited, fetched = (sum(row[name] for row in layers) for name in ("fetch_wait_s", "fetch_s"))
    return 1 - waited / fetched if fetched else 1.0


def by_layer(name: str) -> Callable[[list[Row], Row], float]:
    def value(layers: list[Row], _: Row) -> float:
        ratios = []
        for layer in range(NUM_LAYERS):
            of_ranks = [row[name] for row in layers if row["layer"] == layer]
            ratios.append(max(of_ranks) * WORLD_SIZE / sum(of_ranks))
        return float(sum(ratios) / NUM_LAYERS)

    return value


def exposed_plan(layers: list[Row], _: Row) -> float:
    return float(sum(max(row["plan_s"] for row in layers if row["layer"] == layer) for layer in range(NUM_LAYERS)))


def exposed_bytes(layers: list[Row], _: Row) -> float:
    exposed = [min(1, row["fetch_wait_s"] / row["fetch_s"]) for row in layers if row["fetch_s"]]
    return float(
        sum(row["fetch_bytes"] * share for row, share in zip([r for r in layers if r["fetch_s"]], exposed, strict=True))
    )


def prediction_error(layers: list[Row], _: Row) -> float:
    errors = []
    for layer in range(NUM_LAYERS):
        ranks = [row for row in layers if row["layer"] == layer]
        if ranks[0]["predicted_s"]:
            taken_s = max(row["dispatch_s"] + row["compute_s"] + row["combine_s"] for row in ranks)
            errors.append(abs(taken_s / max(row["predicted_s"] for row in ranks) - 1))
    return float(sum(errors) / len(errors)) if errors else float("nan")


def throughput(layers: list[Row], iteration: Row) -> float:
    links = [sum(row["restore_s"] for row in layers if row["rank"] == rank) for rank in range(WORLD_SIZE)]
    return float(iteration["input_tokens"] / max(iteration["latency_s"], *links))


BY_HAND: dict[str, Callable[[list[Row], Row], float]] = {
    "throughput_tokens_per_s": throughput,
    "ttft_s": column("ttft_s"),
    "latency_s": column("latency_s"),
    "drain_s": column("drain_s"),
    "idle_share": share("idle_s", "layer_s"),
    "imbalance": imbalance,
    "layer_imbalance": by_layer("executed_tokens"),
    "active_expert_imbalance": by_layer("num_active_experts"),
    "exposed_plan_s": exposed_plan,
    "exposed_fetch_bytes": exposed_bytes,
    "exchanged_tokens": lambda layers, _: sum(row["sent_tokens"] for row in layers),
    "num_fetches": lambda layers, _: sum(row["num_host_fetches"] + row["num_peer_fetches"] for row in layers),
    "num_restores": lambda layers, _: sum(row["num_restores"] for row in layers),
    "ahead_hit_rate": lambda layers, _: (
        sum(row["num_ahead_used"] for row in layers) / ahead
        if (ahead := sum(row["num_ahead"] for row in layers))
        else float("nan")
    ),
    "fetch_hidden_share": hidden,
    "fetch_wait_share": share("fetch_wait_s", "layer_s"),
    "dropped_share": share("dropped_tokens", "num_assignments"),
    "padding_factor": lambda layers, _: (
        sum(row["executed_tokens"] + row["padded_tokens"] for row in layers)
        / sum(row["executed_tokens"] for row in layers)
    ),
}
BY_HAND["host_share"] = share("host_tokens", "executed_tokens")
BY_HAND["hit_share"] = lambda layers, iteration: 1 - share("num_misses", "num_active_experts")(layers, iteration)
BY_HAND["prediction_error"] = prediction_error
BY_HAND |= {f"{phase}_s": per_rank(f"{phase}_s") for phase in PHASES}


@pytest.mark.parametrize("name", [metric.name for metric in METRICS])
def test_metric_by_hand(name: str, written: Synthetic, computed: pd.DataFrame) -> None:
    assert len(computed) == len(written.iterations)
    for row, iteration in zip(computed.to_dict("records"), written.iterations, strict=True):
        assert {key: row[key] for key in ("system", "round", "iteration")} == {
            key: iteration[key] for key in ("system", "round", "iteration")
        }
        by_hand = BY_HAND[name](written.layer_rows(iteration["iteration"]), iteration)
        assert row[name] == pytest.approx(by_hand, nan_ok=True)


def test_where_nothing_happens_shares_are_those_of_a_perfect_run(written: Synthetic) -> None:
    """Without fetches nothing was left unhidden, and without tokens no rank had more than another."""
    run = load_run(written.folder)
    zero = run.layers.assign(
        **dict.fromkeys(
            ("executed_tokens", "num_assignments", "dropped_tokens", "num_active_experts", "num_misses"), 0
        ),
        host_tokens=0,
        **dict.fromkeys(("fetch_s", "fetch_wait_s", "idle_s", "layer_s", "predicted_s"), 0.0),
    )
    values = per_iteration(zero, run.iterations)
    expected = {"imbalance": 1.0, "fetch_hidden_share": 1.0, "dropped_share": 0.0, "idle_share": 0.0}
    expected |= {
        "layer_imbalance": 1.0,
        "active_expert_imbalance": 1.0,
        "exposed_fetch_bytes": 0.0,
        "hit_share": 1.0,
        "host_share": 0.0,
    }
    for name, value in expected.items():
        assert (values[name] == value).all(), name
    assert values["prediction_error"].isna().all(), "nobody predicted anything"


def test_documentation_has_the_same_table() -> None:
    assert documented.table("Derived metrics") == [
        [f"`{metric.name}`", metric.unit, metric.better, metric.formula] for metric in METRICS
    ]


def test_a_formula_mentions_known_columns_only() -> None:
    known = {*documented.names("`layers.parquet`"), *documented.names("`iterations.parquet`")}
    for metric in METRICS:
        words = {word.strip("(),;") for word in metric.formula.replace("(", " ").replace(")", " ").split()}
        assert {word for word in words if word.endswith(("_s", "_tokens", "_fetches"))} <= known, metric.name
