from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from analysis.data.load import Sweep, load_run, load_sweep
from analysis.data.summary import summarise
from analysis.present.table import (
    as_text,
    build_table,
    caption,
    figure_caption,
    knowledge_legend,
    skew_points,
    summary_frame,
    unpaired_remark,
    without_letters,
    without_medians,
    without_whiskers,
)
from tests.synthetic import LATENCY_S, write_run, write_sweep

SKEWS = [0.0, 0.5, 0.9]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load_sweep(write_sweep(tmp_path_factory.mktemp("results"), SKEWS))


@pytest.fixture(scope="module")
def frame(sweep: Sweep) -> pd.DataFrame:
    return summary_frame(sweep.runs, [summarise(run) for run in sweep.runs], sweep.points)


def test_frame_has_a_row_per_run_and_system_with_the_numbers_of_its_summary(sweep: Sweep, frame: pd.DataFrame) -> None:
    rows = {(row["router.skew"], row["system"]): row for row in frame.to_dict("records")}
    assert list(rows) == [(skew, system) for skew in SKEWS for system in LATENCY_S]
    for run, skew in zip(sweep.runs, SKEWS, strict=True):
        summary = summarise(run)
        for system, entry in summary["systems"].items():
            row = rows[skew, system]
            assert row["run_id"] == f"skew={skew}"
            assert row["best_baseline"] == (system == "static_ep")
            for name, value in entry.items():
                if isinstance(value, dict):
                    assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (
                        value["median"],
                        value["low"],
                        value["high"],
                    )
                else:
                    assert row[name] == value


def test_letters_say_what_systems_may_see(frame: pd.DataFrame) -> None:
    knows = {"harmoeny": "exact, history", "static_ep": "", "even_split": "exact", "drop": None, "ideal": "lookahead"}
    known = frame.assign(knows=frame["system"].map(knows))
    text = as_text(build_table(known, ["router.skew"], "title"))
    assert "HarMoEny (H, X)" in text
    assert "Even split (X)" in text
    assert "(L)" in text
    for unmarked in ("Static EP (", "Drop ("):
        assert unmarked not in text
    legend = knowledge_legend(known)
    assert legend.startswith("H: places experts by earlier batches; L:")
    assert "X: plans by the batch's own counts" in figure_caption(known)
    assert knowledge_legend(frame) == "", "runs of earlier versions do not say it"
    assert "X:" not in figure_caption(frame)


def test_table_shows_the_numbers_and_marks_what_is_no_baseline(frame: pd.DataFrame) -> None:
    lines = as_text(build_table(frame, ["router.skew"], "title")).splitlines()
    cells = {tuple(line.split()[:2]): line for line in lines}
    # At skew 0 static EP takes 3 s for 1,000 tokens and HarMoEny half of that, in every round.
    assert "2.00 [2.00, 2.00]" in cells["0.0", "HarMoEny"]
    assert " 667 " in cells["0.0", "HarMoEny"]
    assert "= 1.00 [1.00, 1.00]" in cells["Static", "EP"]
    assert "4,000" in next(line for line in lines if "Drop *" in line)  # latency 0.25 s
    assert sum("Drop *" in line for line in lines) == len(SKEWS)
    assert sum("HarMoEny *" in line for line in lines) == 0
    assert [line.split()[0] for line in lines if "HarMoEny" in line] == ["0.0", "0.5", "0.9"]
    assert max(map(len, lines)) <= 100


def test_caption_says_what_the_numbers_were_measured_on(frame: pd.DataFrame) -> None:
    assert caption(frame) == "gloo, CPU of tests, host link memcpy; 2 ranks; scope model; medians of 5 rounds"
    assert "Model switch (8 experts x 3 MoE layers, top-1); data set pydoc." in figure_caption(frame)
    assert ", whiskers: 95 % bootstrap intervals. Model" in figure_caption(frame)


def test_caption_of_one_round_and_of_points_with_different_numbers(frame: pd.DataFrame) -> None:
    alone = frame.assign(num_rounds=1, world_size=1)
    assert caption(alone) == "gloo, CPU of tests, host link memcpy; 1 rank; scope model; one round"
    assert "; one round. Model" in figure_caption(alone)
    assert without_medians(figure_caption(alone), alone) == figure_caption(alone).replace("; one round", "")
    assert without_whiskers(figure_caption(frame), frame).count("medians of 5 rounds. Model") == 1
    lettered = frame.assign(knows="exact")
    assert figure_caption(lettered).endswith(" X: plans by the batch's own counts.")
    assert without_letters(figure_caption(lettered), lettered) == figure_caption(frame)
    mixed = pd.concat([alone, frame])
    assert caption(mixed).endswith("; medians of 1 to 5 rounds")
    assert ": gloo" not in without_medians(figure_caption(mixed), mixed)
    assert "round" not in without_medians(figure_caption(mixed), mixed)


def test_a_caption_promises_no_whiskers_of_one_round(frame: pd.DataFrame) -> None:
    assert "whiskers: 95 %" in figure_caption(frame)
    one = figure_caption(frame.assign(num_rounds=1))
    assert "whiskers" not in one
    assert "; one round." in one


def test_results_of_different_machines_are_all_named(frame: pd.DataFrame) -> None:
    other = frame.assign(device="GPU", backend="nccl", world_size=8, num_experts=128, host_link="cuda")
    text = figure_caption(pd.concat([frame, other]))
    for part in ("gloo + nccl", "CPU of tests + GPU", "cuda + memcpy", "2 + 8 ranks", "(128 experts", "(8 experts"):
        assert part in text


def test_without_a_baseline_the_ratio_is_empty(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", latency_s={"harmoeny": [1.0, 2.0]}).folder)
    frame = summary_frame([run], [summarise(run)], [{}])
    lines = as_text(build_table(frame, [], "title")).splitlines()
    (line,) = [line for line in lines if "HarMoEny" in line]
    assert "[" not in line


def test_runs_without_a_sweep_are_told_apart_by_their_skew(sweep: Sweep) -> None:
    assert skew_points(sweep.runs) == [{"router.skew": skew} for skew in SKEWS]
    sweep.runs[0].config["router"].pop("skew")
    assert skew_points(sweep.runs) == [{}, {}, {}]
    sweep.runs[0].config["router"]["skew"] = SKEWS[0]


def test_systems_in_runs_of_their_own_are_called_unpaired(frame: pd.DataFrame) -> None:
    assert unpaired_remark(frame) == ""
    skew = frame[frame["router.skew"] == 0.5]
    assert unpaired_remark(pd.concat([frame, skew[skew["system"] != "drop"].assign(run_id="lacks_memory")])) == ""
    apart = frame.assign(run_id=frame["run_id"] + frame["system"])
    names = list(dict.fromkeys(frame["system"]))
    assert unpaired_remark(apart) == (
        f"{', '.join(names)} ran in jobs of their own, one after another: their numbers are not paired. One list in "
        f"brackets compares them round by round: 'system=[{','.join(names)}]'."
    )
    text = " ".join(as_text(build_table(apart, ["router.skew"], "title")).split())
    assert "their numbers are not paired" in text
    assert "paired by round" not in text
    assert "paired by round" in " ".join(as_text(build_table(frame, ["router.skew"], "title")).split())


def test_a_narrow_terminal_cuts_no_heading_name_or_mark(frame: pd.DataFrame) -> None:
    names = {"harmoeny": "harmoeny_sync", "drop": "deepspeed_moe_drop"}
    buffer = StringIO()
    table = build_table(frame.assign(system=frame["system"].replace(names)), ["router.skew"], "title")
    Console(file=buffer, width=80).print(table)
    text = buffer.getvalue()
    assert "\u2026" not in text, "something is cut"
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("skew", "system", "tokens/s", "TTFT s", "idle", "imbal.", "dropped"):
        assert heading in text
    assert text.count("*") == len(SKEWS) + 1, "one mark per point of the system that drops, and the note on it"
    assert text.count("= 1.00") == len(SKEWS)


def test_short_times_are_shown_in_milliseconds(frame: pd.DataFrame) -> None:
    text = as_text(build_table(frame.assign(ttft_s=0.000123), ["router.skew"], "title"))
    assert "TTFT ms" in text
    assert text.count(" 0.123 ") == len(frame)


def test_the_worst_batch_stands_beside_a_median_that_hides_it(tmp_path: Path) -> None:
    """Every third batch has 1.5 where the others are even: the median is 1, the mean 7 / 6."""
    written = write_run(tmp_path / "run", latency_s={"harmoeny": [1.0] * 6, "static_ep": [1.0] * 6})
    layers = pd.read_parquet(written.folder / "layers.parquet")
    burst = (layers["system"] == "harmoeny") & (layers["round"] % 3 == 2)
    layers["executed_tokens"] = (100 + 50 * burst * (1 - 2 * layers["rank"])).astype(int)
    layers.to_parquet(written.folder / "layers.parquet", index=False)
    run = load_run(written.folder)
    summary = summarise(run)
    imbalance = summary["systems"]["harmoeny"]["imbalance"]
    assert [imbalance[key] for key in ("median", "mean", "p90", "max")] == pytest.approx([1.0, 7 / 6, 1.5, 1.5])
    frame = summary_frame([run], [summary], [{}])
    assert frame["imbalance_p90"].tolist() == pytest.approx([1.5, 1.0])
    text = as_text(build_table(frame, [], "title"))
    (line,) = [line for line in text.splitlines() if "HarMoEny" in line]
    assert "1.00 (1.50)" in line
    assert "In parentheses: the worst batch." in text
    (line,) = [line for line in text.splitlines() if "Static EP" in line]
    assert "1.00 (" not in line
