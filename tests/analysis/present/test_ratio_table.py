import numpy as np
import pandas as pd
import pytest

from analysis.data.ratios import over_points, point_ratios, winners
from analysis.present.ratio_table import build_ratio_table
from analysis.present.table import as_text

#: Throughput of two points by system; the ratios follow from them.
THROUGHPUT = {
    "harmoeny": (300.0, 90.0), "static_ep": (100.0, 100.0), "eplb": (200.0, 80.0), "drop": (900.0, 900.0),
    "ideal": (800.0, 800.0),
}  # fmt: skip


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = []
    for at, size in enumerate((64, 512)):
        rivals = {name: THROUGHPUT[name][at] for name in ("static_ep", "eplb")}
        best = max(rivals, key=lambda name: rivals[name])
        for system, values in THROUGHPUT.items():
            ratio = values[at] / rivals[best]
            rows.append(
                {
                    "seq_len": size, "run_id": f"run {at}", "system": system, "exact": system != "drop",
                    "bound": system == "ideal", "baseline": system != "harmoeny", "best_baseline": system == best,
                    "throughput_tokens_per_s": values[at], "throughput_ratio_to_best_baseline": ratio,
                    "throughput_ratio_to_best_baseline_low": ratio, "throughput_ratio_to_best_baseline_high": ratio,
                    "knows": "exact" if system == "harmoeny" else "", "backend": "simulator", "device": "dgx",
                    "host_link": "simulated", "scope": "layer", "exchange": "collective", "world_size": 8,
                    "num_rounds": 5,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_winners_are_exact_systems_and_no_bounds(frame: pd.DataFrame) -> None:
    assert winners(frame)["system"].tolist() == ["harmoeny", "static_ep"]


def test_ratios_over_points(frame: pd.DataFrame) -> None:
    table = over_points(frame).set_index("system")
    assert list(table.index) == ["harmoeny", "eplb", "static_ep"]  # by falling median
    assert list(table.loc["harmoeny"]) == pytest.approx([2, 1, 0.9, 1.2, 1.5, np.nan], nan_ok=True)
    assert list(table.loc["static_ep"]) == pytest.approx([2, 1, 0.5, 0.75, 1.0, np.nan], nan_ok=True)
    assert list(table.loc["eplb"]) == pytest.approx([2, 0, 0.8, 0.9, 1.0, np.nan], nan_ok=True)


def test_what_is_kept_of_the_throughput_at_no_skew_counts_skewed_points_alone(frame: pd.DataFrame) -> None:
    """The first point is the second without skew, where HarMoEny has 300."""
    frame["throughput_ratio_to_no_skew"] = frame["throughput_tokens_per_s"] / 300
    frame["best_at_no_skew"] = (frame["system"] == "harmoeny") & (frame["run_id"] == "run 0")
    kept = over_points(frame).set_index("system")["to_no_skew"]
    assert kept.to_dict() == pytest.approx({"harmoeny": 0.3, "static_ep": 1 / 3, "eplb": 80 / 300})
    text = as_text(build_ratio_table(frame, ["seq_len"], "grid"))
    assert "to best at no skew" in text
    assert next(line for line in text.splitlines() if "HarMoEny (X)" in line).split()[-1] == "0.30"


def test_points_of_a_system_are_named_with_the_best_rival(frame: pd.DataFrame) -> None:
    rows = point_ratios(frame, ["seq_len"], "harmoeny")
    assert rows["seq_len"].tolist() == [512, 64]
    assert rows["rival"].tolist() == ["static_ep", "eplb"]
    assert rows["winner"].tolist() == ["static_ep", "harmoeny"]


def test_the_table_says_who_is_how_good_and_where_ours_is_lowest(frame: pd.DataFrame) -> None:
    text = as_text(build_ratio_table(frame, ["seq_len"], "grid"))
    assert "grid: 2 points" in text
    line = next(line for line in text.splitlines() if "HarMoEny (X)" in line)
    assert line.split()[2:] == ["1", "2", "0.90", "1.20", "1.50"]
    assert "0.90 to Static EP: seq_len=512" in text
    assert text.index("seq_len=512") < text.index("seq_len=64")
    assert "Drop" not in text
    others = as_text(build_ratio_table(frame[frame["baseline"]], ["seq_len"], "grid"))
    assert "lowest" not in others
