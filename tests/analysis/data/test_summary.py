import json
from pathlib import Path
from typing import Any

import pytest

from analysis import summary as command
from analysis.data.load import Run, load_run
from analysis.data.metrics import METRICS
from analysis.data.summary import best_baseline, summarise, write_summary
from tests import documented
from tests.synthetic import LATENCY_S, change_manifest, write_run, write_serving


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(write_run(tmp_path / "run").folder)


def test_medians_by_hand(run: Run) -> None:
    systems = summarise(run)["systems"]
    for name, latencies in LATENCY_S.items():
        middle = sorted(latencies)[2]
        assert systems[name]["latency_s"]["median"] == middle
        assert systems[name]["ttft_s"]["median"] == 0.75 * middle
        assert systems[name]["throughput_tokens_per_s"]["median"] == 1000 / middle
        assert systems[name]["throughput_tokens_per_s"]["n"] == 5


def test_ratio_is_paired_by_round_with_the_best_baseline(run: Run) -> None:
    summary = summarise(run)
    assert summary["best_baseline"] == "static_ep"
    ratio = {name: entry["throughput_ratio_to_best_baseline"] for name, entry in summary["systems"].items()}
    # In every round HarMoEny is twice as fast as static EP: the interval is a point although rounds differ 8 times.
    assert ratio["harmoeny"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 5}
    assert ratio["static_ep"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 5}
    # By round 1/2, 2/2.5, 3/4, 4/5, 8/8.5.
    assert ratio["even_split"]["median"] == pytest.approx(0.8)


def test_rounds_that_are_fast_for_one_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    latency_s = {"static_ep": [1.0, 2.0, 3.0], "harmoeny": [2.0, 3.0, 1.0]}
    systems = summarise(load_run(write_run(tmp_path / "run", latency_s=latency_s).folder))["systems"]
    # By round 1/2, 2/3, 3/1; sorted first, both would have the same samples.
    assert systems["harmoeny"]["throughput_ratio_to_best_baseline"]["median"] == pytest.approx(2 / 3)


def test_order_of_rows_does_not_matter(run: Run) -> None:
    shuffled = Run(
        run.folder,
        run.manifest,
        run.config,
        run.layers.sample(frac=1, random_state=3),
        run.iterations.sample(frac=1, random_state=4),
    )
    assert json.dumps(summarise(shuffled)["systems"]["even_split"]["throughput_ratio_to_best_baseline"]) == json.dumps(
        summarise(run)["systems"]["even_split"]["throughput_ratio_to_best_baseline"]
    )


def test_fastest_system_is_no_baseline_if_it_drops_tokens_or_is_ours_or_a_bound(run: Run) -> None:
    summary = summarise(run)
    throughput = {name: e["throughput_tokens_per_s"]["median"] for name, e in summary["systems"].items()}
    assert sorted(throughput, key=lambda name: -throughput[name]) == [
        "drop",
        "ideal",
        "harmoeny",
        "static_ep",
        "even_split",
    ]
    assert summary["best_baseline"] == "static_ep"


@pytest.mark.parametrize("names", [("harmoeny",), ("drop",), ("harmoeny", "drop"), ("ideal", "harmoeny")])
def test_without_an_exact_baseline_there_is_no_ratio(names: tuple[str, ...], tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", latency_s={name: LATENCY_S[name] for name in names}).folder)
    summary = summarise(run)
    assert summary["best_baseline"] is None
    assert list(summary["systems"]) == list(names)
    assert all("throughput_ratio_to_best_baseline" not in entry for entry in summary["systems"].values())


def test_best_is_by_median_and_not_by_best_round(tmp_path: Path) -> None:
    latency_s = {"static_ep": [0.01, 5.0, 5.0], "even_split": [4.0, 4.0, 4.0]}
    run = load_run(write_run(tmp_path / "run", latency_s=latency_s).folder)
    assert best_baseline(run, summarise(run)["systems"]) == "even_split"


def test_file_holds_what_was_returned_and_is_replaced_in_one_step(run: Run) -> None:
    (run.folder / "summary.json").write_text("old")
    summary = write_summary(run)
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


def test_percentiles_and_decode_by_hand(run: Run) -> None:
    write_serving(run.folder, list(LATENCY_S), 5)
    entry = summarise(load_run(run.folder))["systems"]["even_split"]
    # Round r has eleven requests evenly from r + 1 to r + 2 s: of all 55 the median is 3.5 s, a tenth is above 5.46 s.
    for percent, expected in ((50, 3.5), (90, 5.46)):
        assert entry[f"ttft_p{percent}_s"]["median"] == pytest.approx(expected)
        assert entry[f"open_loop_ttft_p{percent}_s"]["median"] == pytest.approx(2 * expected)
    assert not any("p99" in name for name in entry), "it needs 368 requests"
    assert entry["open_loop_queue_s"]["median"] == pytest.approx(3.5)
    assert entry["tpot_s"]["median"] == 3.0
    assert entry["output_tokens_per_s"]["median"] == pytest.approx(10 / 3)
    assert entry["ttft_p50_s"]["n"] == 55
    assert not any("p50" in name or "tpot" in name for name in summarise(run)["systems"]["even_split"])


def test_documentation_has_the_same_fields(run: Run) -> None:
    write_serving(run.folder, list(LATENCY_S), 5)
    summary = json.loads(json.dumps(summarise(load_run(run.folder))))
    written = set(documented.names("`summary.json`"))
    top = {name for name in written if not name.startswith("systems.")}
    assert set(summary) == top | {"systems"}
    entry = {name.removeprefix("systems.<name>.") for name in written - top}
    entry -= {"ttft_p99_s", "open_loop_ttft_p99_s"}  # too few requests
    metrics = {metric.name for metric in METRICS}
    for system in summary["systems"].values():
        assert set(system) == (entry - {"<metric>"}) | (metrics - {"prediction_error"}), "none of them predicts"
        assert set(system["latency_s"]) == {"median", "low", "high", "n", "mean", "p90", "max"}


@pytest.mark.parametrize("damaged", [b"", b"\xa0\xff{", b"{}"])
def test_a_damaged_summary_is_written_again(damaged: bytes, run: Run) -> None:
    (run.folder / "summary.json").write_bytes(damaged)
    assert write_summary(run) == json.loads((run.folder / "summary.json").read_text())


class TestCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
        monkeypatch.setattr("sys.argv", ["summary", *map(str, arguments)])
        command.main()

    def test_recomputes(self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.call(monkeypatch, run.folder)
        assert capsys.readouterr().out.strip() == str(run.folder / "summary.json")
        assert json.loads((run.folder / "summary.json").read_text()) == summarise(run)

    def test_unfinished_run_is_named(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change_manifest(run.folder, status="failed")
        with pytest.raises(SystemExit) as caught:
            self.call(monkeypatch, run.folder)
        assert caught.value.code == 2
        assert f"error: {run.folder}: status is 'failed', must be 'finished'" in capsys.readouterr().err
