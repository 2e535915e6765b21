"""``until=``: rounds go on until the intervals that the report will show are narrow, or there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.data.load import load_run
from analysis.data.pairing import ratios_to_no_skew
from analysis.data.summary import summarise
from experiments.launch.rank import run_rank
from experiments.measure.batch import make_batch
from experiments.measure.goal import Goal
from experiments.measure.records import Records
from experiments.results.yardstick_rows import YardstickTime
from experiments.text.prepare import prepare_point
from tests.conftest import Load
from tests.experiments.runs import begin, set_up

KINDS = {"harmoeny": (False, True), "static_ep": (True, True), "eplb": (True, True), "drop": (True, False)}
SMALL = (
    "model=moe_stack", "model.hidden_size=16", "model.intermediate_size=16", "model.vocab_size=1024", "batch_size=1",
    "seq_len=8", "dataset=random", "device=cpu", "world_size=1", "system=[harmoeny,static_ep,even_split]",
)  # fmt: skip


class Measurement:
    """Rounds of points that take given times, every second one as long as restores do, as one rank sees them."""

    def __init__(self, latency_s: Sequence[dict[str, list[float]]], **options: Any) -> None:
        self._latency_s = latency_s
        given = {"rounds": 4, "until": 0.02, "max_rounds": None, "max_minutes": None} | options
        rig: Any = SimpleNamespace(comm=SimpleNamespace(rank=0, world_size=1))
        self._benches: Any = [
            SimpleNamespace(
                systems=[self._system(name) for name in systems],
                point=SimpleNamespace(
                    options=SimpleNamespace(**given),
                    most_rounds=given["max_rounds"] or 5 * given["rounds"],
                    labels=lambda skew=skew: {"router.skew": skew},
                ),
            )
            for skew, systems in zip((0, 0.9), latency_s, strict=False)
        ]
        self.goal = Goal(rig, self._benches)
        self.records = [Records() for _ in latency_s]

    def _system(self, name: str) -> Any:
        baseline, exact = KINDS[name]
        return SimpleNamespace(name=name, policy=SimpleNamespace(baseline=baseline, exact=exact, bound=False))

    def run(self, moved: Sequence[int] = ()) -> int:
        """Measure until the goal is reached; return the number of rounds."""
        index = 0
        while not self.goal.is_reached(index, self.records):
            for latency_s, records in zip(self._latency_s, self.records, strict=True):
                for name, taken in latency_s.items():
                    start_s = 10.0 * index
                    times = {"start_s": start_s, "end_s": start_s + taken[index] * (0.5 + 0.5 * (index % 2))}
                    one: Any = SimpleNamespace(system=name, **times, restoring_s=taken[index])
                    records.iterations.append(one)
                records.yardstick += [YardstickTime(index, m, 0, 1 + m * (index in moved), 1.0) for m in range(2)]
            index += 1
        return index


def noisy(share: float, base_s: float, seed: int) -> list[float]:
    return [base_s * float(factor) for factor in np.random.default_rng(seed).lognormal(0, share, 100)]


def test_it_goes_on_until_the_interval_is_narrow() -> None:
    latency_s = {"harmoeny": noisy(0.05, 1.0, 0), "static_ep": noisy(0.05, 2.0, 1)}
    measurement = Measurement([latency_s], max_rounds=90)
    num_rounds = measurement.run()
    reached = measurement.goal.reached
    assert reached is not None
    assert (reached.rounds, reached.ended_by) == (num_rounds, "until")
    assert 8 <= num_rounds < 90
    assert num_rounds % 2 == 0, "two rounds that mirror each other"
    assert reached.reach is not None
    assert reached.reach <= 0.02
    assert f"after {num_rounds} rounds" in reached.text
    stricter = Measurement([latency_s], until=0.015, max_rounds=90)
    assert stricter.run() > num_rounds


@pytest.mark.parametrize(("rounds", "expected"), [(4, 8), (9, 10), (12, 12)])
def test_quiet_rounds_are_as_many_as_were_asked_for(rounds: int, expected: int) -> None:
    latency_s = {"harmoeny": noisy(0.001, 1.0, 0), "static_ep": noisy(0.001, 2.0, 1)}
    assert Measurement([latency_s], rounds=rounds).run() == expected


@pytest.mark.parametrize("max_rounds", [None, 11])
def test_it_ends_at_the_most_rounds(max_rounds: int | None) -> None:
    latency_s = {"harmoeny": noisy(0.5, 1.0, 0), "static_ep": noisy(0.5, 2.0, 1)}
    measurement = Measurement([latency_s], max_rounds=max_rounds)
    assert measurement.run() == (max_rounds or 20)
    assert measurement.goal.reached is not None
    assert measurement.goal.reached.ended_by == "max_rounds"
    assert measurement.goal.reached.text.endswith("ended by max_rounds")


def test_it_ends_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 100000, 60))
    monkeypatch.setattr("experiments.measure.goal.time.monotonic", lambda: next(now_s))
    latency_s = {"harmoeny": noisy(0.5, 1.0, 0), "static_ep": noisy(0.5, 2.0, 1)}
    measurement = Measurement([latency_s], max_rounds=90, max_minutes=3)
    assert measurement.run() == 12, "asked after 8, 10 and 12 rounds, a minute apart"
    assert measurement.goal.reached is not None
    assert measurement.goal.reached.ended_by == "max_minutes"


def test_only_what_is_compared_has_to_be_narrow() -> None:
    latency_s = {
        "harmoeny": noisy(0.001, 1.0, 0), "static_ep": noisy(0.001, 2.0, 1), "eplb": noisy(0.5, 9.0, 2),
        "drop": noisy(0.5, 0.1, 3),
    }  # fmt: skip
    assert Measurement([latency_s]).run() == 8, "the best exact baseline is Static EP"
    assert Measurement([{"static_ep": latency_s["static_ep"], "eplb": latency_s["eplb"]}]).run() == 20, (
        "there is nothing of ours"
    )
    jumpy = {"harmoeny": noisy(0.2, 1.0, 4), "static_ep": noisy(0.001, 2.0, 5)}
    jumpy["static_ep"] = [2 * own for own in jumpy["harmoeny"]]  # the same in every round
    assert Measurement([jumpy]).run() == 8
    assert Measurement([latency_s, jumpy]).run() == 20, "to the point without skew it is another in every round"


def test_rounds_in_which_the_machine_moved_do_not_count() -> None:
    latency_s = {"harmoeny": noisy(0.03, 1.0, 0), "static_ep": noisy(0.03, 2.0, 1)}
    quiet = Measurement([latency_s], until=0.03, max_rounds=90).run()
    assert Measurement([latency_s], until=0.03, max_rounds=90).run(moved=range(90)) > quiet


def test_the_interval_is_the_one_that_the_report_shows(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    points = [load(*SMALL, "rounds=2", "until=1e-9", "max_rounds=10", f"router.skew={skew}") for skew in (0, 0.9)]
    run_rank(begin(*points), prepare_point(points[0]))
    runs = [load_run(point.folder) for point in points]
    reaches = [
        (ratio["high"] - ratio["low"]) / (2 * ratio["median"])
        for run in runs
        for ratio in [summarise(run)["systems"]["harmoeny"]["throughput_ratio_to_best_baseline"]]
    ] + [
        (ratio.high - ratio.low) / (2 * ratio.median)
        for run, system, ratio, _ in ratios_to_no_skew(runs)
        if run is runs[1] and system == "harmoeny"
    ]
    for run in runs:
        assert run.iterations["round"].nunique() == run.manifest["until"]["rounds"] == 10
        assert run.manifest["until"]["ended_by"] == "max_rounds"
        assert run.manifest["until"]["reach"] == pytest.approx(max(reaches), rel=1e-6)
        assert len(pd.read_parquet(run.folder / "requests.parquet")["round"].unique()) == 10


def test_further_rounds_have_texts_of_their_own(load: Load) -> None:
    point = load(*SMALL, "system=[static_ep,exflow]", "rounds=2", "until=0.02", "max_rounds=6")
    tokens, model = prepare_point(point), point.model.build(0)
    assert tokens.num_tokens == (6 + point.calibration_batches + 1) * 8, "room for all that may come"
    bench = set_up(point, tokens)
    texts = [bench.batch(index).input_ids.tolist() for index in (*range(6), -1)]
    assert len({str(text) for text in texts}) == 7
    assert len(bench.batches) == 6
    again = make_batch(point, model, tokens, 5, 0, bench.comm.device)
    assert again.input_ids.tolist() == texts[5]


def test_what_makes_no_sense_is_refused(load: Load) -> None:
    for options, message in {
        ("until=0",): r"until: 0\.0, must be above 0 and below 1",
        ("until=2",): r"until: 2\.0, must be above 0 and below 1",
        ("max_rounds=20",): "max_rounds: 20, must be null without until=",
        ("max_minutes=3",): r"max_minutes: 3\.0, must be null without until=",
        ("until=0.02", "system=[static_ep]"): r"until: 0\.02, must be null for a single system",
        ("until=0.02", "max_rounds=3"): r"max_rounds: 3, must be at least 9 \(rounds\)",
        ("until=0.02", "max_minutes=0"): r"max_minutes: 0\.0, must be above 0",
        ("until=0.02", "backend=simulator", "hardware=dgx1_v100"): r"until: 0\.02, must be null with backend=simulator",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            load(*options)


def test_the_name_of_a_run_is_as_before_without_it(load: Load) -> None:
    plain, asked = load(*SMALL), load(*SMALL, "until=0.02")
    assert plain.run_id != asked.run_id
    assert plain.run_id != load(*SMALL, "until=0.02", "max_rounds=30").run_id
    assert asked.most_rounds == 45
