import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import claims as module
from analysis.claims import COMMANDS, as_markdown, as_table, claims
from analysis.data.load import load_run
from analysis.present.table import as_text
from tests.synthetic import change_manifest, write_run

#: HarMoEny takes half of static EP's time in every round, and less of even split's.
CHANGES = {"throughput": 1.0, "ttft": -0.5}


def rows_of(frame: pd.DataFrame, claim: str, origin: str) -> list[dict[Any, Any]]:
    return frame[(frame["claim"] == claim) & (frame["origin"] == origin)].to_dict("records")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured run at skew 0.9, one at 0, and a simulated one in which HarMoEny's batches are four times as large."""
    folder = tmp_path_factory.mktemp("results")
    write_run(folder / "skewed")
    write_run(folder / "even", skew=0.0)
    change_manifest(folder / "even", run_id="even", point={"router.skew": 0.0})
    write_run(folder / "simulated", latency_s={"harmoeny": [4.0, 4.0], "static_ep": [2.0, 2.0]}, skew=0.5)
    change_manifest(folder / "simulated", backend="simulator", device="dgx1_v100")
    path = folder / "simulated" / "iterations.parquet"
    frame = pd.read_parquet(path)
    larger = np.where(frame["system"] == "harmoeny", 4, 1)
    frame["num_sequences"] *= larger
    frame["input_tokens"] *= larger
    frame.to_parquet(path)
    return folder


@pytest.fixture(scope="module")
def frame(folder: Path) -> pd.DataFrame:
    return claims([folder])


@pytest.mark.parametrize("claim", CHANGES)
def test_measured_changes_are_paired_and_against_the_next_best_exact_system(claim: str, frame: pd.DataFrame) -> None:
    """Drop is faster and the bound too, but neither is compared with; nothing is claimed at skew 0."""
    (row,) = rows_of(frame, claim, "measured")
    assert row["baseline"] == "static_ep"
    assert (row["change"], row["change_low"], row["change_high"]) == pytest.approx((CHANGES[claim],) * 3)
    assert (row["skew"], row["num_rounds"], row["backend"], row["device"]) == (0.9, 5, "gloo", "CPU of tests")


def test_idle_time_is_that_of_all_ranks_and_layers_against_who_idles_most(folder: Path, frame: pd.DataFrame) -> None:
    layers = pd.read_parquet(folder / "skewed" / "layers.parquet")
    idle: dict[str, list[float]] = {}
    for name in ("harmoeny", "static_ep", "even_split"):
        of_system = layers[layers["system"] == name]
        idle[name] = [sum(of_system.loc[of_system["round"] == r, "idle_s"]) for r in range(5)]
    worst = max(("static_ep", "even_split"), key=lambda name: sorted(idle[name])[2])
    ratios = sorted(ours / theirs for ours, theirs in zip(idle["harmoeny"], idle[worst], strict=True))
    (row,) = rows_of(frame, "idle", "measured")
    assert row["baseline"] == worst
    assert row["change"] == pytest.approx(ratios[2] - 1)


def test_where_batches_differ_time_to_first_token_is_per_sequence(frame: pd.DataFrame) -> None:
    """A batch of four times the size in twice the time: half the time per sequence, twice the throughput."""
    assert [row["change"] for row in rows_of(frame, "throughput", "simulated")] == pytest.approx([1.0])
    (row,) = rows_of(frame, "ttft", "simulated")
    assert row["change"] == pytest.approx(-0.5)
    assert row["note"] == "whole batches: 3.00 s, Static EP 1.50 s"
    assert "20 (Static EP: 5) sequences per rank" in row["conditions"]
    assert np.isnan(row["change_low"]), "the simulator has no noise that an interval could describe"


def test_published_changes_are_the_abstracts_where_the_figures_tell(frame: pd.DataFrame) -> None:
    throughput = {row["skew"]: row for row in rows_of(frame, "throughput", "published")}
    assert throughput[0.5]["change"] == pytest.approx(0.37, abs=0.005)
    assert 0.37 < throughput[0.9]["change"] < 0.70
    ttft = {row["skew"]: row["change"] for row in rows_of(frame, "ttft", "published")}
    assert -0.41 < ttft[0.9] < -0.34
    assert {row["baseline"] for row in throughput.values()} == {"fastermoe"}
    (idle,) = rows_of(frame, "idle", "published")
    assert idle["change"] <= -0.84


def test_what_is_not_at_hand_is_said_with_the_command(tmp_path: Path) -> None:
    frame = claims([tmp_path, tmp_path / "nowhere"])
    for claim in ("throughput", "ttft", "idle"):
        assert rows_of(frame, claim, "abstract")
        for origin, command in COMMANDS.items():
            (row,) = rows_of(frame, claim, origin)
            assert row["note"] == f"not at hand: {command}"
            assert np.isnan(row["change"])


def test_a_system_that_drops_tokens_is_no_baseline(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run").folder
    systems = load_run(folder).systems
    change_manifest(folder, systems=systems | {"static_ep": systems["static_ep"] | {"exact": False}})
    (row,) = rows_of(claims([tmp_path]), "throughput", "measured")
    assert row["baseline"] == "even_split"


def test_table_and_markdown_show_every_row(frame: pd.DataFrame) -> None:
    text, markdown = as_text(as_table(frame)), as_markdown(frame)
    for shown in ("+37 % to +70 %", "-34 % to -41 %", "up to -84 %", "+100% [+100%, +100%]"):
        assert shown in text
        assert shown in markdown
    body = [line for line in markdown.splitlines() if line.startswith("| ") and not line.startswith(("| |", "| ---"))]
    assert len(body) == len(frame)
    assert {line.count("|") for line in body} == {6}


def test_command_writes_what_it_prints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["claims", str(folder), "--out", str(tmp_path / "out")])
    module.main()
    assert "Claims of arXiv 2506.12417" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert set(written["origin"]) == {"abstract", "published", "simulated", "measured"}
    assert "not at hand" not in (tmp_path / "out" / "claims.md").read_text()
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        module.main()
    assert "does not exist, must be a folder of runs" in capsys.readouterr().err
