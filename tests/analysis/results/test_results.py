from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.data.load import load_run
from analysis.results.__main__ import main
from analysis.results.catalogue import catalogue, find
from analysis.results.compare import compare, unpaired_ratio
from analysis.results.export import export
from analysis.results.index import write_index
from tests.synthetic import LATENCY_S, change_manifest, change_platform, write_run, write_sweep


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A finished sweep of two points, one that lacks a point, and a failed run of its own."""
    write_sweep(tmp_path / "whole", [0.0, 0.9])
    part = write_sweep(tmp_path / "part", [0.0, 0.5])
    change_manifest(tmp_path / "part" / "skew=0.5", status="running")
    write_run(tmp_path / "single" / "alone")
    change_manifest(tmp_path / "single" / "alone", status="failed", ended_at="2026-01-02T03:04:05+00:00")
    summary = {
        "systems": {
            n: {"throughput_tokens_per_s": {"median": m}, "exact": True, "bound": n == "ideal"}
            for n, m in (("harmoeny", 2), ("static_ep", 1), ("ideal", 9))
        }
    }
    (tmp_path / "whole" / "skew=0.0" / "summary.json").write_text(json.dumps(summary))
    (part / "torn").mkdir()
    (part / "torn" / "sweep.json").write_text("{")
    return tmp_path


def test_everything_is_listed_with_its_state(results: Path) -> None:
    entries = {entry.folder.relative_to(results).parts[0]: entry for entry in catalogue(results)}
    assert {name: (e.num_finished, e.num_points, e.status) for name, e in entries.items()} == {
        "whole": (2, 2, "finished"), "part": (1, 2, "running"), "single": (0, 1, "failed"),
    }  # fmt: skip
    assert entries["whole"].best == "harmoeny (1)", "the bound is no system, and one run has no summary"
    assert entries["whole"].machine == "CPU of tests (gloo)"
    assert entries["single"].ended_at == "2026-01-02 03:04"
    assert next(iter(catalogue(results))).folder.name == "alone", "the latest first"
    with pytest.raises(ValueError, match="must be a folder of results"):
        catalogue(results / "nowhere")


def test_runs_are_found_by_options_and_fields(results: Path) -> None:
    def found(**wanted: str) -> list[str]:
        names = {name.replace("__", "."): value for name, value in wanted.items()}
        return [str(path.relative_to(results)) for path, _ in find(results, names).runs]

    assert found(status="running") == ["part/skew=0.5"]
    assert found(device="CPU of tests", status="failed") == ["single/alone"]
    assert found(systems__drop__exact="false", status="running") == ["part/skew=0.5"]
    assert found(router__num_hot="7") == []
    assert find(results, {"status": "running", "router.skew": "0.5"}).values == {
        "status": {"finished", "running", "failed"}, "router.skew": {"0", "0.5", "0.9"},
    }  # fmt: skip


def test_runs_are_found_by_what_only_a_sweep_knows(results: Path) -> None:
    path = results / "whole" / "sweeps" / "0123abcd" / "sweep.json"
    content = json.loads(path.read_text())
    content["values"] = [{"what_if": "steeper"}, {"what_if": "as_recorded"}]
    path.write_text(json.dumps(content))
    ((run, _),) = find(results, {"what_if": "as_recorded"}).runs
    assert run == results / "whole" / "skew=0.9"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skew", "'skew', must be an option or a field of the manifest that a run in .* has, as router.skew, point"),
        ("router.skw", "'router.skw', must be .* has, as router.skew"),
        ("zzzz", "'zzzz', must be an option or a field of the manifest that a run in .* has$"),
    ],
)
def test_what_no_run_has_is_refused(name: str, message: str, results: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find(results, {"status": "finished", name: "1"})


def test_a_page_links_what_there_is(results: Path) -> None:
    (results / "whole" / "sweeps" / "0123abcd" / "report.html").write_text("x")
    text = write_index(catalogue(results), results).read_text()
    assert '<a href="whole/sweeps/0123abcd/report.html">report</a>' in text
    assert text.count("<tr>") == 4
    assert "1 of 2" in text
    assert str(results) not in text


def slower(results: Path, name: str, factor: float) -> Path:
    latency = {system: [factor * s for s in seconds] for system, seconds in LATENCY_S.items()}
    write_run(results / name / "run", latency_s=latency)
    return results / name / "run"


def test_what_was_measured_apart_is_compared_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = slower(tmp_path, "before", 1.0), slower(tmp_path, "after", 40.0)
    found = compare(before, after)
    assert {change.system for change in found.changes} == {"harmoeny", "static_ep", "even_split", "ideal"}
    assert all(change.ratio.median == pytest.approx(1 / 40) and not change.paired for change in found.changes)
    assert found.warnings[0].startswith("not paired")
    assert main(["compare", str(before), str(after), "--fail-if-slower", "5%"]) == 1
    said = capsys.readouterr()
    assert "slower by more than 5.0%: Static EP: 0.025" in said.out
    assert "warning: not paired" in said.err
    assert main(["compare", str(after), str(before), "--fail-if-slower", "5%"]) == 0
    assert main(["compare", str(before), str(after)]) == 0


def test_what_is_not_certain_fails_nobody(tmp_path: Path) -> None:
    before, after = slower(tmp_path, "before", 1.0), slower(tmp_path, "after", 1.2)
    assert all(
        change.ratio.low < 1 < change.ratio.high for change in compare(before, after).changes if change.system != "drop"
    )
    assert main(["compare", str(before), str(after), "--fail-if-slower", "0.05"]) == 0


@pytest.mark.parametrize("way", ["group", "simulated"])
def test_pairs_are_compared_by_round(way: str, tmp_path: Path) -> None:
    """Rounds differ by a factor of 8, and every ratio is 1 / 1.2."""
    runs = slower(tmp_path, "before", 1.0), slower(tmp_path, "after", 1.2)
    for run in runs:
        if way == "group":
            change_manifest(run, group={"id": "x", "run_ids": [], "mirrored": False})
        else:
            change_platform(run, "simulator", "dgx_h100")
    found = compare(*runs)
    assert not [warning for warning in found.warnings if "paired" in warning]
    for change in found.changes:
        assert change.paired
        assert (change.ratio.low, change.ratio.high) == pytest.approx((1 / 1.2, 1 / 1.2))
    assert main(["compare", *map(str, runs), "--fail-if-slower", "5%"]) == 1


def test_simulations_of_other_batches_are_no_pairs(tmp_path: Path) -> None:
    runs = slower(tmp_path, "before", 1.0), slower(tmp_path, "after", 1.2)
    for run in runs:
        change_platform(run, "simulator", "dgx_h100")
    change_manifest(runs[1], run_id="another")
    found = compare(*runs)
    assert not any(change.paired for change in found.changes)
    assert "results_dir=" in found.warnings[0], "how they would be pairs"


def test_points_are_matched_by_their_options(tmp_path: Path) -> None:
    sweeps = []
    for name, skews in (("before", [0.0, 0.5, 0.9]), ("after", [0.9, 0.0])):
        sweeps.append(write_sweep(tmp_path / name, skews))
        for skew in skews:
            path = tmp_path / name / f"skew={skew}" / "config.yaml"
            config = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump(config | {"router": {"skew": skew}, "tag": name, name: 1}))
    found = compare(*sweeps)
    assert {change.point.partition(",")[0] for change in found.changes} == {"router.skew=0.0", "router.skew=0.9"}
    assert all(change.ratio.median == pytest.approx(1.0) for change in found.changes)
    assert "2 points are in both, of 3 and 2" in found.warnings
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no finished run in it"):
        compare(sweeps[0], tmp_path / "empty")


def test_unpaired_intervals_cover_the_truth() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        found = unpaired_ratio(1.5 * rng.lognormal(0, 0.1, 15), rng.lognormal(0, 0.1, 15))
        hits += found.low <= 1.5 <= found.high
    assert hits >= 178


def test_what_is_sent_names_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.results.export.getpass.getuser", lambda: "joan")
    sweep = write_sweep(tmp_path / "results", [0.0, 0.9])
    run = tmp_path / "results" / "skew=0.9"
    host = {"name": "node-17", "platform": "Linux-6.1", "cpu": "CPU of tests", "python": "3.11"}
    change_manifest(run, host=host, beside=[{"run": "x", "pid": 1}], error=f"in {run}/layers.parquet of joan")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"router": {"path": "/data/joan/trace.parquet"}}))
    (sweep / "table.txt").write_text(f"node-17 at {tmp_path}, by joan; joanna stays\n")
    (sweep / "serving.csv").write_text("rate_per_s\n8\n")
    out = tmp_path / "sent"
    files = export(sweep, out)
    assert {path.relative_to(out).parts[0] for path in files} >= {
        "report.html",
        "table.txt",
        "serving.csv",
        "runs",
        "iterations.csv",
    }
    assert (out / "table.txt").read_text() == "HOST at FOLDER, by USER; joanna stays\n"
    assert yaml.safe_load((out / "runs" / "skew=0.9.config.yaml").read_text())["router"]["path"] == "trace.parquet"
    manifest = json.loads((out / "runs" / "skew=0.9.manifest.json").read_text())
    assert manifest["host"] == {"cpu": "CPU of tests", "python": "3.11"}
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".txt", ".csv", ".html", ".md"):
            text = re.sub(r"<(script|style)>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
            for secret in ("node-17", str(tmp_path), "/data/"):
                assert secret not in text, path
            assert not re.search(r"\bjoan\b", text), path
    assert catalogue(out) == [], "what was sent is no result of this machine"
    original = (sweep / "report.html").read_text()
    styles = [re.findall(r"<style>.*?</style>", text, re.S) for text in (original, (out / "report.html").read_text())]
    assert styles[0] == styles[1]
    with pytest.raises(ValueError, match="must be empty or not there"):
        export(sweep, out)
    with pytest.raises(ValueError, match=f"results: must be the folder of a sweep or a run, as {sweep}$"):
        export(tmp_path / "results", tmp_path / "other")


def test_the_command_lists_finds_and_refuses(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(results)]) == 0
    assert "1 of 2" in capsys.readouterr().out
    assert main(["find", "status=running", "--folder", str(results)]) == 0
    assert capsys.readouterr().out == f"{results / 'part' / 'skew=0.5'}  running\n"
    assert main(["find", "router.skew=0.7", "--folder", str(results)]) == 0
    assert capsys.readouterr() == ("", "0 runs\nnone has router.skew=0.7; they have 0, 0.5, 0.9\n")
    assert main(["index", str(results)]) == 0
    assert main(["find", "status", "--folder", str(results)]) == 2
    assert capsys.readouterr().err.endswith("error: 'status', must be NAME=VALUE\n")
    with pytest.raises(SystemExit):
        main(["compare", "a", "b", "--fail-if-slower", "many"])
    assert "'many', must be a share such as 5% or 0.05" in capsys.readouterr().err


def test_a_single_run_is_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert load_run(tmp_path / "run")
    assert (tmp_path / "out" / "report.html") in export(tmp_path / "run", tmp_path / "out")
