from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.results.layer_rows import (
    Platform,
    RankIteration,
    expert_counts,
    iteration_frame,
    layer_frame,
    layer_row,
    routing_frame,
)
from experiments.results.manifest import new_manifest
from experiments.results.request_rows import Decoded, Served, decode_frame, decode_totals, num_good, request_frame
from experiments.results.run_folder import RunFolder
from harmoeny.plan import Plan
from harmoeny.runtime.layer.recorder import LayerMarks, LayerTimes
from harmoeny.runtime.memory.fetch.base import FetchStats
from harmoeny.runtime.memory.host import HostStats
from harmoeny.runtime.memory.slots import Transfer
from results_schema import tables
from tests import documented
from tests.conftest import Load

PLATFORM = Platform("gloo", "CPU of tests", "memcpy")


def times(
    tokens: list[Any],
    *,
    num_assignments: int,
    boundary_s: list[float],
    layer: int = 0,
    early: list[list[int]] | None = None,
) -> LayerTimes:
    counts = np.array(tokens, dtype=np.int64)
    plan = Plan(tokens=counts, fetch=np.zeros((counts.shape[1], counts.shape[0]), dtype=np.bool_))
    plan = plan if early is None else replace(plan, early=np.array(early))
    moved = FetchStats(num_host_fetches=3, num_peer_fetches=2, num_misses=4, fetch_bytes=640, restores=[Transfer()] * 4)
    moved.num_ahead, moved.num_ahead_used, moved.num_halved_fetches = 3, 1, 1
    host = HostStats(num_tokens=3, activation_bytes=96)
    marks = LayerMarks(layer, plan=plan, num_assignments=num_assignments, fetch=moved, padded_tokens=7, host=host)
    return LayerTimes(
        marks, boundary_s, fetch_s=0.5, fetch_wait_s=0.25, restore_s=0.75, restore_wait_s=0.125, host_s=0.0625,
        host_wait_s=0.03125,
    )  # fmt: skip


# tokens[src][expert][dst] of two ranks and three experts: rank 0 wants 12 and drops 2, rank 1 wants 8 and drops none.
TOKENS = [[[4, 0], [0, 6], [0, 0]], [[3, 0], [1, 0], [0, 4]]]
BOUNDARY_S = [1.0, 1.5, 2.5, 2.75, 4.75, 8.75, 9.0]


def test_layer_row_by_hand() -> None:
    row = layer_row(times(TOKENS, num_assignments=12, boundary_s=BOUNDARY_S, layer=5), rank=0, origin_s=100.0)
    assert row == {
        "layer": 5,
        "rank": 0,
        "num_assignments": 12,
        "executed_tokens": 4 + 3 + 1,
        "sent_tokens": 6,
        "dropped_tokens": 2,
        "padded_tokens": 7,
        "num_active_experts": 2,
        "num_host_fetches": 3,
        "num_peer_fetches": 2,
        "num_restores": 4,
        "num_halved_fetches": 1,
        "num_ahead": 3,
        "num_ahead_used": 1,
        "fetch_bytes": 640,
        "fetch_s": 0.5,
        "fetch_wait_s": 0.25,
        "restore_s": 0.75,
        "restore_wait_s": 0.125,
        "route_s": 0.5,
        "metadata_s": 1.0,
        "plan_s": 0.25,
        "dispatch_s": 2.0,
        "compute_s": 4.0,
        "combine_s": 0.25,
        "layer_s": 8.0,
        "predicted_s": 0.0,
        "host_tokens": 3,
        "activation_bytes": 96,
        "num_misses": 4,
        "host_s": 0.0625,
        "host_wait_s": 0.03125,
        "compute_end_s": 108.75,
    }


def test_what_was_executed_before_the_plan_is_executed_and_neither_sent_nor_dropped() -> None:
    late, begun = (
        layer_row(times(TOKENS, num_assignments=n, boundary_s=BOUNDARY_S, early=early), rank=0, origin_s=0.0)
        for n, early in ((12, None), (17, [[2, 0, 3], [0, 9, 0]]))
    )
    changed = {"num_assignments": 17, "executed_tokens": 4 + 3 + 1 + 5, "num_active_experts": 3}
    assert begun == late | changed


def test_assignments_are_conserved_over_ranks() -> None:
    rows = [
        layer_row(times(TOKENS, num_assignments=n, boundary_s=BOUNDARY_S), rank=rank, origin_s=0.0)
        for rank, n in enumerate((12, 8))
    ]
    wanted, executed, dropped = (
        sum(row[name] for row in rows) for name in ("num_assignments", "executed_tokens", "dropped_tokens")
    )
    assert wanted == executed + dropped
    assert dropped == 2


def iteration(rank: int, index: int, *, start_s: float, end_s: float, compute_end_s: list[float]) -> RankIteration:
    """A pass of two ranks; ``compute_end_s`` per layer, on the common clock."""
    boundaries = [[0.0, 0.0, 0.0, 0.0, 0.0, end, end + 1] for end in compute_end_s]
    layers = [
        layer_row(times(TOKENS, num_assignments=12, boundary_s=b, layer=i), rank, 0.0) for i, b in enumerate(boundaries)
    ]
    return RankIteration(
        system="static_ep",
        round=index,
        iteration=index,
        rank=rank,
        start_s=start_s,
        end_s=end_s,
        drain_s=0.5 * rank,
        num_sequences=1 + 2 * rank,
        input_tokens=100 * (1 + 2 * rank),
        layers=layers,
    )


# Rank 0 is first in one layer of an iteration and last in the other; the second iteration is later altogether.
ITERATIONS = [
    iteration(0, 0, start_s=10.0, end_s=12.0, compute_end_s=[10.5, 11.75]),
    iteration(0, 1, start_s=20.0, end_s=21.0, compute_end_s=[20.25, 20.75]),
    iteration(1, 0, start_s=10.25, end_s=11.25, compute_end_s=[11.0, 11.5]),
    iteration(1, 1, start_s=19.5, end_s=24.0, compute_end_s=[20.25, 23.0]),
]


def test_idle_is_until_the_last_rank_ends_in_the_same_layer_and_iteration() -> None:
    frame = layer_frame(ITERATIONS, PLATFORM)
    idle = {(r["iteration"], r["layer"], r["rank"]): r["idle_s"] for r in frame.to_dict("records")}
    assert idle == {
        (0, 0, 0): 0.5,
        (0, 0, 1): 0.0,
        (0, 1, 0): 0.0,
        (0, 1, 1): 0.25,
        (1, 0, 0): 0.0,
        (1, 0, 1): 0.0,
        (1, 1, 0): 2.25,
        (1, 1, 1): 0.0,
    }


def test_requests_of_the_closed_loop_by_hand() -> None:
    frame = request_frame(ITERATIONS, [], PLATFORM)
    # Iteration 0 begins at 10.25 s, when the last rank has left the barrier, and iteration 1 at 20 s.
    expected = {(0, 0): 12.0 - 10.25, (0, 1): 11.25 - 10.25, (1, 0): 21.0 - 20.0, (1, 1): 24.0 - 20.0}
    for (round_index, rank), ttft_s in expected.items():
        rows = frame[(frame["round"] == round_index) & (frame["rank"] == rank)]
        (seen,) = [it for it in ITERATIONS if (it.iteration, it.rank) == (round_index, rank)]
        assert len(rows) == seen.num_sequences
        assert set(rows["ttft_s"]) == {ttft_s}
        assert set(rows["queue_s"]) == {0.0}
    assert set(frame["loop"]) == {"closed"}


def test_open_loop_by_hand() -> None:
    served = [Served("x", 0, 1, 1, 0, 8, arrival_s=0.5, start_s=2.0, first_token_s=3.0),
              Served("x", 0, 0, 0, 1, 8, arrival_s=0.25, start_s=0.5, first_token_s=2.0)]  # fmt: skip
    frame = request_frame([], served, PLATFORM)
    assert frame["request"].tolist() == [0, 1]
    assert frame["queue_s"].tolist() == [0.25, 1.5]
    assert frame["ttft_s"].tolist() == [1.75, 2.5]


def test_further_tokens_by_hand() -> None:
    served = [
        Served("x", 0, 0, 0, 0, 8, arrival_s=1.0, start_s=2.0, first_token_s=4.0, later_s=[4.5, 7.0], rate_per_s=3.0),
        Served("x", 0, 0, 1, 1, 8, arrival_s=1.0, start_s=2.0, first_token_s=4.0, rate_per_s=3.0),
    ]
    first, single = request_frame([], served, PLATFORM).to_dict("records")
    assert (first["ttft_s"], first["decode_s"], first["tpot_s"], first["output_tokens"]) == (3.0, 3.0, 1.5, 3)
    assert first["itl_s"].tolist() == [0.5, 2.5]
    assert (single["decode_s"], single["tpot_s"], single["output_tokens"], len(single["itl_s"])) == (0.0, 0.0, 1, 0)
    assert num_good(served, "x", {"ttft_s": 3.0}) == 2
    assert num_good(served, "x", {"tpot_s": 1.4}) == 1, "one token has no time per token"
    assert num_good(served, "x", {"e2e_s": 5.9, "tpot_s": 9.0}) == 1
    assert num_good(served, "y", {}) == 0


def test_decode_by_hand() -> None:
    layer = layer_row(times(TOKENS, num_assignments=12, boundary_s=BOUNDARY_S), rank=0, origin_s=0.0)
    ranks = [
        Decoded("x", 0, 0, 3, 4, first_token_s=10.0, last_token_s=12.0, totals=decode_totals([layer, layer])),
        Decoded("x", 0, 1, 1, 4, first_token_s=10.5, last_token_s=13.0, totals=decode_totals([layer])),
    ]
    (row,) = decode_frame(ranks, PLATFORM).to_dict("records")
    assert row["output_tokens"] == 16
    assert row["decode_s"] == 2.5
    assert row["output_tokens_per_s"] == 16 / 2.5
    assert [row[name] for name in ("executed_tokens", "host_tokens", "num_active_experts")] == [3 * 8, 3 * 3, 3 * 2]
    assert [row[name] for name in ("num_misses", "fetch_bytes", "activation_bytes")] == [3 * 4, 3 * 640, 3 * 96]
    assert (row["fetch_s"], row["fetch_wait_s"]) == (1.5, 0.75)
    assert row["tpot_s"] == (3 * 2.0 / 4 + 2.5 / 4) / 4


def test_iterations_by_hand() -> None:
    first, second = iteration_frame(ITERATIONS, PLATFORM, "model").to_dict("records")
    assert first == {
        "system": "static_ep",
        "round": 0,
        "iteration": 0,
        "scope": "model",
        "backend": "gloo",
        "device": "CPU of tests",
        "host_link": "memcpy",
        "world_size": 2,
        "num_sequences": 4,
        "input_tokens": 400,
        "latency_s": 1.75,  # from 10.25, when the last rank had left the barrier, to 12.0
        "ttft_s": (1 * 1.75 + 3 * 1.0) / 4,
        "throughput_tokens_per_s": 400 / 1.75,
        "drain_s": 0.5,
    }
    assert second["latency_s"] == 4.0
    assert second["ttft_s"] == (1 * 1.0 + 3 * 4.0) / 4


def test_throughput_is_of_batches_that_can_follow_one_another() -> None:
    """Of the next one, which takes 1.75 s, rank 1's link is still busy with restores of 3 s for this one."""
    first, _, beside, _ = ITERATIONS
    late = replace(beside, layers=[layer | {"restore_s": 1.5} for layer in beside.layers])
    (row,) = iteration_frame([first, late], PLATFORM, "model").to_dict("records")
    assert (row["latency_s"], row["throughput_tokens_per_s"]) == (1.75, 400 / 3.0)


def test_routing_by_hand() -> None:
    batches = [
        expert_counts([np.array([[0, 2], [2, -1]]), np.array([[1, 0]])], 4),
        expert_counts([np.zeros((0, 2), dtype=np.int64), np.array([[3, 1], [3, 1]])], 4),
    ]
    rows = routing_frame(batches, [0, 1]).to_dict("records")
    assert [(row["round"], row["layer"], row["stack"], row["counts"].tolist()) for row in rows] == [
        (0, 0, 0, [1, 0, 2, 0]),
        (0, 1, 1, [1, 1, 0, 0]),
        (1, 0, 0, [0, 0, 0, 0]),
        (1, 1, 1, [0, 2, 0, 2]),
    ]


@pytest.mark.parametrize(
    ("table", "frame"),
    [
        (tables.LAYERS, layer_frame(ITERATIONS, PLATFORM)),
        (tables.ITERATIONS, iteration_frame(ITERATIONS, PLATFORM, "model")),
        (tables.REQUESTS, request_frame(ITERATIONS, [], PLATFORM)),
        (tables.ROUTING, routing_frame([np.ones((2, 4), dtype=np.int64)], [0, 0])),
        (tables.DECODE, decode_frame([Decoded("x", 0, 0, 1, 1, 0.0, 1.0, decode_totals([]))], PLATFORM)),
    ],
)
def test_documentation_schema_and_records_have_the_same_columns(table: tables.Table, frame: pd.DataFrame) -> None:
    written = documented.names(f"`{table.file}`")
    assert len(set(written)) == len(written)
    assert set(frame.columns) == set(table.column_names) == set(written)


def test_every_field_of_a_new_manifest_is_documented(load: Load) -> None:
    manifest = new_manifest(load())
    assert set(manifest) <= set(documented.names("`manifest.json`"))
    assert {key for system in manifest["systems"].values() for key in system} <= set(
        documented.names_in("`manifest.json`", "`systems`")
    )


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    frame = layer_frame(ITERATIONS, PLATFORM)
    RunFolder(tmp_path).write_tables({tables.LAYERS: frame})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "layers.parquet"), frame)
    assert [path.name for path in tmp_path.iterdir()] == ["layers.parquet"]
