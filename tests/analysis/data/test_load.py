import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from analysis.data.load import find_runs, load_run, load_sweep
from analysis.data.results import find_results
from analysis.explore import load_results
from results_schema.manifest import MANIFEST_FIELDS, REQUIRED_FIELDS
from results_schema.tables import ITERATIONS, LAYERS
from scripts.slurm import collect
from tests import documented
from tests.synthetic import change_manifest, write_run, write_sweep

FILES = ("manifest.json", "config.yaml", "layers.parquet", "iterations.parquet")


def test_run_comes_back_as_written(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", skew=0.5)
    run = load_run(written.folder)
    assert run.layers.to_dict("records") == written.layers
    assert run.iterations.to_dict("records") == written.iterations
    assert run.config["router"]["skew"] == 0.5
    assert list(run.systems) == ["harmoeny", "static_ep", "even_split", "drop", "ideal"]


@pytest.mark.parametrize("status", ["running", "failed"])
def test_unfinished_run_is_refused_by_name(status: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "myrun").folder
    change_manifest(folder, status=status)
    with pytest.raises(ValueError, match=rf"^.*/myrun: status is '{status}', must be 'finished'$"):
        load_run(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(Path.unlink, id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"\xff{[: \0"), id="garbage"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5]), id="truncated"),
    ],
)
def test_damaged_run_is_refused_by_name(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "myrun").folder
    damage(folder / name)
    with pytest.raises(ValueError, match=r"/myrun(:|/)"):
        load_run(folder)


@pytest.mark.parametrize("name", ["layers.parquet", "iterations.parquet", "manifest.json"])
@pytest.mark.parametrize("lost", [1, 9, 200])
def test_file_that_lost_its_end_is_refused_by_name(name: str, lost: int, tmp_path: Path) -> None:
    path = write_run(tmp_path / "myrun").folder / name
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"/myrun: "):
        load_run(path.parent)


@pytest.mark.many
@pytest.mark.parametrize(
    ("name", "column"),
    [
        *(("layers", column.name) for column in LAYERS.columns if column.added is None),
        *(("iterations", column) for column in ITERATIONS.column_names),
    ],
)
def test_missing_column_is_named(name: str, column: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "myrun").folder / f"{name}.parquet"
    pd.read_parquet(path).drop(columns=column).to_parquet(path)
    with pytest.raises(ValueError, match=rf"/myrun/{name}\.parquet: column '{column}' is missing$"):
        load_run(path.parent)


def test_a_column_that_earlier_revisions_did_not_write_has_its_value(tmp_path: Path) -> None:
    path = write_run(tmp_path / "myrun", predicts={"harmoeny"}).folder / "layers.parquet"
    assert load_run(path.parent).layers["predicted_s"].max() > 0
    pd.read_parquet(path).drop(columns="predicted_s").to_parquet(path)
    assert (load_run(path.parent).layers["predicted_s"] == 0).all()


def test_throughput_of_earlier_revisions_is_replaced_by_that_of_today(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", restore_s=1.0)
    path = written.folder / ITERATIONS.file
    frame = pd.read_parquet(path)
    then = frame["input_tokens"] / frame["latency_s"]
    assert (then > frame["throughput_tokens_per_s"]).any()
    frame.assign(throughput_tokens_per_s=then).to_parquet(path, index=False)
    found = load_run(written.folder).iterations["throughput_tokens_per_s"].tolist()
    assert found == pytest.approx([row["throughput_tokens_per_s"] for row in written.iterations])


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_missing_field_of_the_manifest_is_named(field: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "myrun").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[field]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"/myrun(/manifest\.json: field '{field}' is missing|.*has no {field})$"):
        load_run(folder)


@pytest.mark.parametrize("name", ["layers", "iterations"])
@pytest.mark.parametrize("keep", [slice(0), slice(-1), slice(1, None)], ids=["none", "but the last", "but the first"])
def test_missing_rows_are_noticed(name: str, keep: slice, tmp_path: Path) -> None:
    path = write_run(tmp_path / "myrun").folder / f"{name}.parquet"
    pd.read_parquet(path)[keep].to_parquet(path)
    with pytest.raises(ValueError, match=r"/myrun/(layers|iterations)\.parquet: \d+ rows, must be (\d+|at least 1)$"):
        load_run(path.parent)


def test_what_the_analysis_reads_of_a_manifest_is_documented() -> None:
    assert set(REQUIRED_FIELDS) <= set(MANIFEST_FIELDS) == set(documented.names("`manifest.json`"))


def test_finished_runs_are_found_and_others_passed_over(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/er"):
        write_run(tmp_path / name)
    change_manifest(write_run(tmp_path / "failed").folder, status="failed")
    (write_run(tmp_path / "damaged").folder / "manifest.json").write_text("{")
    assert [str(run.folder.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "b", "deep/er"]


class TestSweep:
    def test_runs_come_in_the_sweeps_order_with_their_values(self, tmp_path: Path) -> None:
        sweep = load_sweep(write_sweep(tmp_path, [0.9, 0.0, 0.5]))
        assert sweep.points == [{"router.skew": 0.9}, {"router.skew": 0.0}, {"router.skew": 0.5}]
        assert [run.config["router"]["skew"] for run in sweep.runs] == [0.9, 0.0, 0.5]
        assert sweep.missing == []
        assert sweep.experiment == "skew_sweep"

    def test_what_is_not_finished_is_listed(self, tmp_path: Path) -> None:
        folder = write_sweep(tmp_path, [0.0, 0.25, 0.5, 0.75])
        change_manifest(tmp_path / "skew=0.0", status="failed")
        (tmp_path / "skew=0.5" / "manifest.json").write_text('{"sta')
        (tmp_path / "skew=0.75" / "manifest.json").unlink()
        sweep = load_sweep(folder)
        assert sweep.missing == ["skew=0.0", "skew=0.5", "skew=0.75"]
        assert sweep.points == [{"router.skew": 0.25}]
        assert [run.folder.name for run in sweep.runs] == ["skew=0.25"]

    def test_damaged_table_of_a_finished_run_is_an_error_that_says_what_to_do(self, tmp_path: Path) -> None:
        folder = write_sweep(tmp_path, [0.0, 0.5])
        (tmp_path / "skew=0.5" / "layers.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"/skew=0\.5: cannot be read \(.*\); delete the folder and run it again$"):
            load_sweep(folder)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"run_ids": []}', '{"run_ids": ["a"], "values": []}'])
    def test_damaged_list_is_refused_by_name(self, text: str, tmp_path: Path) -> None:
        folder = write_sweep(tmp_path, [0.0])
        (folder / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: no readable sweep\.json \("):
            load_sweep(folder)


def test_results_behind_a_link_are_found_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, disk = tmp_path / "results", tmp_path / "disk"
    results.mkdir()
    sweep = write_sweep(disk / "smoke", [0.0, 0.5])
    write_run(disk / "smoke" / "alone", skew=0.25)
    (results / "smoke").symlink_to(disk / "smoke")
    (results / "smoke" / "again").symlink_to(results)
    there, here = find_results(disk), find_results(results)
    assert [one.folder.relative_to(disk) for one in there.sweeps] == [sweep.relative_to(disk)]
    assert [one.folder.relative_to(results) for one in here.sweeps] == [sweep.relative_to(disk)]
    assert [run.folder.relative_to(results) for run in here.single_runs] == [Path("smoke", "alone")]
    assert len(find_runs(results)) == len(find_runs(disk)) > 1
    assert len(load_results(results).runs) == len(load_results(disk).runs)
    monkeypatch.setattr("sys.argv", ["collect", str(results)])
    collect.main()
    assert "report: " in capsys.readouterr().out
