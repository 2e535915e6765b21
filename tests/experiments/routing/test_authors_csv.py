from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments.routing.authors_csv import read_published
from scripts.compare_balance import OUT, REFERENCE, compare
from tests.conftest import ROOT

needs_reference = pytest.mark.skipif(not (ROOT / REFERENCE).is_dir(), reason=f"{REFERENCE} does not exist")
HEADER = ",dataset,iteration,layer_idx,0,1,2\n"
ROWS = ["0,books,0,0,5,0,1", "1,books,0,1,2,2,2", "2,wiki,0,0,6,0,0", "3,books,1,0,1,4,1", "4,books,1,1,0,0,6"]


def written(folder: Path, rows: list[str], header: str = HEADER) -> Path:
    path = folder / "expert_freq_x.csv"
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def test_a_series_by_hand(tmp_path: Path) -> None:
    trace = read_published(written(tmp_path, ROWS), "books")
    assert trace.counts.tolist() == [[[[5, 0, 1]], [[2, 2, 2]]], [[[1, 4, 1]], [[0, 0, 6]]]]
    assert trace.num_tokens.tolist() == [[[6], [6]], [[6], [6]]]
    assert (trace.dataset, trace.top_k, trace.model) == ("books", 1, "expert_freq_x")
    # Six tokens on four ranks: 5 of expert 0, then 1 of expert 2.
    assert trace.spread_counts(0, 0, 4).tolist() == [[2, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]]


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS, "\ufeff" + HEADER)
    assert read_published(path, "wiki").counts.tolist() == [[[[6, 0, 0]]]]


def test_the_layout_by_skew(tmp_path: Path) -> None:
    rows = [row.replace("books", "0.5").replace("wiki", "0.0") for row in ROWS]
    path = written(tmp_path, rows, HEADER.replace("dataset", "router_skew"))
    assert read_published(path, "0.5").num_batches == 2
    assert read_published(path, "0.5").dataset == "skew 0.5"
    assert read_published(path, "0").counts.tolist() == [[[[6, 0, 0]]]]


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "case": (lambda p: written(p, ROWS), r"router\.case: 'no', must be one of books, wiki, the datasets in "),
    "negative": (lambda p: written(p, [*ROWS, "5,no,0,0,1,-1,1"]), r"FILE: row 6: column '1' is '-1', must be"),
    "text": (lambda p: written(p, [*ROWS, "5,no,0,0,1,x,1"]), r"FILE: row 6: column '1' is 'x', must be"),
    "fraction": (lambda p: written(p, ["0,no,0,0,1,1.5,1"]), r"FILE: row 1: column '1' is '1\.5', must be a number of"),
    "short": (lambda p: written(p, [*ROWS[:1], "1,books,0,1,2", *ROWS[2:]]), r"FILE: row 2: 5 values, must be 7"),
    "twice": (lambda p: written(p, ["0,no,0,0,1,1,1", "1,no,0,0,1,1,1"]), r"FILE: row 2: iteration 0, layer 0 of no"),
    "missing": (lambda p: written(p, ["0,no,1,0,1,1,1"]), r"FILE: no row for iteration 0, layer 0 of no"),
    "layout": (lambda p: written(p, ROWS, ",a,b,c,0,1,2\n"), r"FILE: the columns are not those of a published routing"),
    "order": (lambda p: written(p, ROWS, ",dataset,iteration,layer_idx,0,2,1\n"), r"FILE: the columns are not those"),
    "empty": (lambda p: written(p, []), r"FILE: no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_by_name_and_row(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    path = make(tmp_path)
    with pytest.raises(ValueError, match="^" + message.replace("FILE", re.escape(str(path)))):
        read_published(path, "no")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(ValueError, match=rf"^{path}: row 5 is cut off"):
        read_published(path, "books")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return compare(ROOT / REFERENCE)


@needs_reference
class TestTheAuthorsFiles:
    def test_all_series_are_whole(self) -> None:
        for name, case, shape, tokens in (
            ("expert_freq_switch128_datasets.csv", "wmt19", (30, 12, 1, 128), {8 * 64 * 1024, 8 * 64}),
            ("expert_freq_switch128_skew.csv", "0.9", (89, 12, 1, 128), None),
            ("expert_freq_qwen_policy_datasets.csv", "random", (20, 12, 1, 60), {6 * 16 * 1024}),
        ):
            trace = read_published(ROOT / REFERENCE / name, case)
            assert trace.counts.shape == shape
            assert tokens is None or set(trace.num_tokens.ravel().tolist()) == tokens

    def test_the_table_in_results_is_what_the_code_gives(self, table: pd.DataFrame) -> None:
        pd.testing.assert_frame_equal(pd.read_csv(ROOT / OUT), table, rtol=0, atol=1e-6, check_dtype=False)

    def test_static_placement_and_dropping_have_the_published_loads(self, table: pd.DataFrame) -> None:
        for system in ("static_ep", "drop"):
            rows = table[table["system"] == system].set_index(["dataset", "stack", "source"])["imbalance"].unstack()
            assert len(rows) == 8
            assert (abs(rows["planned"] - rows["published"]) < 2e-6).all()

    def test_harmoeny_balances_no_worse_than_published_with_no_more_fetches_than_greedy_needs(
        self, table: pd.DataFrame
    ) -> None:
        encoder = table[table["stack"] == "encoder"].assign(key=table["dataset"] + table["system"] + table["source"])
        rows = {row["key"]: row for row in encoder.to_dict("records")}
        for dataset in ("bookcorpus", "wikitext", "wmt19", "random"):
            ours, published = rows[f"{dataset}harmoenyplanned"], rows[f"{dataset}harmoenypublished"]
            greedy = rows[f"{dataset}harmoeny_greedyplanned"]
            assert ours["imbalance"] <= published["imbalance"]
            assert ours["worst_imbalance"] <= published["worst_imbalance"]
            assert ours["fetches_per_layer"] <= greedy["fetches_per_layer"]
