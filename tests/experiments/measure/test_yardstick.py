"""The machine's yardstick: measured at both ends of every point's round, on every rank, and never inside a pass."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.launch.rank import run_rank
from experiments.measure import rounds
from experiments.measure.goal import Goal
from experiments.measure.yardstick import Taken, Yardstick
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point
from harmoeny.runtime.exchange.comm import Communicator
from tests.conftest import Load
from tests.experiments.runs import begin


def test_the_median_of_all_that_is_done_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine sleeps longer than it was asked to, never shorter: one slow repetition must not show."""
    yardstick, calls = Yardstick(Communicator(torch.device("cpu"))), list[object]()

    def sleep(*arguments: object, **_: object) -> None:
        calls.append(arguments)
        time.sleep(0.02)

    monkeypatch.setattr(torch, "mm", sleep)
    assert yardstick.measure().product_s >= 0.02
    assert len(calls) == 5
    ticks = iter([0, 1, 10, 11, 20, 29, 30, 31, 40, 41])
    monkeypatch.setattr("experiments.measure.yardstick.time.perf_counter", lambda: next(ticks))
    assert yardstick._time(lambda: None) == 1, "one of five took nine times as long"
    assert (yardstick.product_flops, yardstick.copy_bytes) == (2 * 512**3, 1 << 24)


def test_the_end_of_a_points_systems_is_the_beginning_of_the_next_points() -> None:
    moments = iter(range(100))
    rig: Any = SimpleNamespace(
        begin_round=lambda: None,
        progress=SimpleNamespace(say=lambda _: None),
        yardstick=SimpleNamespace(measure=lambda: Taken(float(next(moments)), 0.5)),
        comm=SimpleNamespace(rank=1),
    )
    point = SimpleNamespace(options=SimpleNamespace(warmup_rounds=1, rounds=2, until=None), most_rounds=2)
    benches: Any = [
        SimpleNamespace(systems=[], point=point, batch=lambda _: None, begin_loop=lambda: None) for _ in range(2)
    ]
    first, second = rounds.run_rounds(rig, benches, Goal(rig, benches))
    seen = [[(one.round, one.moment, one.product_s) for one in records.yardstick] for records in (first, second)]
    # Three moments in every round, those of the warm-up (0, 1, 2) are thrown away; round 1 goes the other way.
    assert sorted(seen) == sorted(
        [[(0, 0, 3), (0, 1, 4), (1, 0, 7), (1, 1, 8)], [(0, 0, 4), (0, 1, 5), (1, 0, 6), (1, 1, 7)]]
    )
    assert {(one.rank, one.copy_s) for one in first.yardstick} == {(1, 0.5)}


def test_its_times_are_in_a_table_and_its_size_in_the_manifest(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    point = load(
        "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=16", "model.vocab_size=1024", "rounds=3",
        "batch_size=1", "seq_len=8", "dataset=random", "device=cpu", "world_size=1", "system=[static_ep]",
    )  # fmt: skip
    run_rank(begin(point), prepare_point(point))
    table = pd.read_parquet(point.folder / "yardstick.parquet")
    assert table[["round", "moment", "rank"]].to_numpy().tolist() == [[r, m, 0] for r in range(3) for m in range(2)]
    assert (table[["product_s", "copy_s"]] > 0).all(axis=None)
    assert RunFolder(point.folder).manifest["yardstick"] == {"product_flops": 2 * 512**3, "copy_bytes": 1 << 24}
