from pathlib import Path
from typing import Any

import pytest

from analysis.report.html.headline import measured_on
from analysis.report.html.warnings import warnings_of
from tests.analysis.report.html.results import (
    QUIET_S,
    change_tables,
    good_run,
    section_of,
    sections_of,
    write_sweep_of,
)
from tests.synthetic import change_config, change_manifest


def warned(folder: Path) -> dict[str, tuple[str, str]]:
    """Level and text by title."""
    return {alert.title: (alert.level, alert.text) for alert in warnings_of(section_of(folder))}


def test_good_results_warn_of_nothing(tmp_path: Path) -> None:
    assert warned(good_run(tmp_path / "run")) == {}


@pytest.mark.parametrize(
    ("title", "level", "changes", "said"),
    [
        ("Failed checks", "error", {"checks": {
            "harmoeny": {"relative_error": 0.5, "tolerance": 1e-4, "passed": False},
            "static_ep": {"relative_error": 1e-7, "tolerance": 1e-4, "passed": True}}}, "HarMoEny at router skew 0.9"),
        ("Outputs not checked", "warning", {"checks": {}}, "run"),
        ("Changed code", "warning", {"git": {"revision": "0123", "dirty": True}}, "differed"),
        ("Unknown code", "note", {"git": {"revision": None, "dirty": None}}, "no git revision"),
        ("Ranks share cores", "warning", {"threads_per_rank": 2}, "2 ranks x 2 threads on 2 cores"),
        ("Ranks share cores", "warning", {"host": {"name": "here", "num_cores": 1, "cpu_quota": 0.5,
            "cores_limited_by": "a CPU quota of 0.5 cores"}}, "2 ranks x 1 threads on 1 core: a CPU quota of 0.5"),
        ("Ranks share cores", "warning", {"host": {"name": "here", "num_cores": 2, "cpu_quota": 1.5}}, "on 2 cores)"),
        ("Measured beside others", "warning", {"beside": [{"run": "smoke/other", "pid": 1, "since": ""}] * 2},
         "router skew 0.9 (smoke/other). Measure again alone (force=true)"),
        ("Out of memory", "warning", {"out_of_memory": {"eplb": "rank 0 lacks 3 GB"}}, "EPLB at router skew 0.9: rank"),
        ("MoE layers only", "note", {"scope": "layer"}, "not of a model"),
        ("Text read twice", "note", {"dataset": {"name": "pydoc", "repeats_text": True}}, "repeat"),
    ],
)  # fmt: skip
def test_what_the_manifest_says(tmp_path: Path, title: str, level: str, changes: dict[str, Any], said: str) -> None:
    found = warned(good_run(tmp_path / "run", **changes))
    assert list(found) == [title]
    assert found[title][0] == level
    assert said in found[title][1]


def test_failed_check_names_no_system_that_passed(tmp_path: Path) -> None:
    checks = {name: {"relative_error": 1.0, "tolerance": 1e-4, "passed": name != "harmoeny"} for name in QUIET_S}
    _, text = warned(good_run(tmp_path / "run", checks=checks))["Failed checks"]
    assert "Static EP" not in text


def test_gravest_comes_first(tmp_path: Path) -> None:
    checks = {name: {"relative_error": 1.0, "tolerance": 1e-4, "passed": False} for name in QUIET_S}
    folder = good_run(tmp_path / "run", checks=checks, scope="layer", git={"revision": "0", "dirty": True})
    assert [alert.level for alert in warnings_of(section_of(folder))] == ["error", "warning", "note"]


def test_wide_interval_names_the_noisy_system_only(tmp_path: Path) -> None:
    noisy = QUIET_S | {"harmoeny": [0.8, 0.4, 1.2, 0.5, 1.1]}
    found = warned(good_run(tmp_path / "run", noisy))
    assert list(found) == ["Noise: wide intervals"]
    assert "1 of 2: HarMoEny at router skew 0.9" in found["Noise: wide intervals"][1]


@pytest.mark.parametrize(("rounds", "few"), [(1, True), (4, True), (5, False)])
def test_too_few_rounds(tmp_path: Path, rounds: int, few: bool) -> None:
    found = warned(good_run(tmp_path / "run", {name: [1.0] * rounds for name in QUIET_S}))
    assert ("Too few rounds" in found) == few


def test_first_round_that_is_slow_for_all_was_no_warm_up(tmp_path: Path) -> None:
    slow = {name: [seconds[0] * 1.5, *seconds[1:], *seconds[1:]] for name, seconds in QUIET_S.items()}
    found = warned(good_run(tmp_path / "run", slow))
    assert "router skew 0.9 (by 49%)" in found["Warm-up too short"][1]
    one = QUIET_S | {"harmoeny": slow["harmoeny"][:5]}
    assert "Warm-up too short" not in warned(good_run(tmp_path / "one", one))


def test_drift_of_the_machine_is_noticed(tmp_path: Path) -> None:
    drifting = {name: [*seconds, *(1.3 * s for s in seconds)] for name, seconds in QUIET_S.items()}
    found = warned(good_run(tmp_path / "run", drifting))
    assert "(+30%)" in found["Drift while measuring"][1]
    # Where the router changes from round to round, the rounds differ on purpose.
    dynamic = good_run(tmp_path / "dynamic", drifting, point={"router": "dynamic"})
    assert "Drift while measuring" not in warned(dynamic)


def test_run_without_warm_up_says_so(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run")
    change_config(folder, warmup_rounds=1)
    assert warned(folder) == {}
    change_config(folder, warmup_rounds=0)
    assert list(warned(folder)) == ["No warm-up"]


def test_emulated_link_is_a_note_with_its_rate(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run")
    change_tables(folder, host_link="emulated")
    change_config(folder, hardware={"host_link_bytes_per_s": 8e9})
    found = warned(folder)
    assert list(found) == ["Emulated host link"]
    assert "8 GB/s" in found["Emulated host link"][1]


def test_simulated_figures_are_named_and_not_judged_as_measurements(tmp_path: Path) -> None:
    noisy = {"static_ep": [3.0, 1.0, 2.0], "harmoeny": [1.0, 0.4, 1.2]}
    folder = good_run(
        tmp_path / "run", noisy, backend="simulator", device="dgx", hardware_source="datasheet", checks={}
    )
    change_tables(folder, backend="simulator", device="dgx", host_link="simulated")
    found = warned(folder)
    assert list(found) == ["Simulated, not measured"]
    assert "dgx (datasheet)" in found["Simulated, not measured"][1]


def test_dropping_systems_and_a_missing_baseline_are_noted(tmp_path: Path) -> None:
    found = warned(good_run(tmp_path / "run", {"harmoeny": [1.0] * 5, "drop": [0.9] * 5}))
    assert list(found) == ["Systems that drop tokens", "No baseline"]
    assert found["Systems that drop tokens"][1].startswith("Drop: ")


class TestSweep:
    def sweep(self, tmp_path: Path, **changes: Any) -> Path:
        for skew in (0.0, 0.5):
            good_run(tmp_path / f"skew={skew}", skew=skew, **(changes if skew else {}))
        skews = (0.0, 0.5, 0.9)
        return write_sweep_of(tmp_path, [{"router.skew": s} for s in skews], [f"skew={s}" for s in skews])

    def test_missing_runs_are_named(self, tmp_path: Path) -> None:
        found = warned(self.sweep(tmp_path))
        assert list(found) == ["Unfinished sweep"]
        assert "1 of its runs is not finished (skew=0.9)" in found["Unfinished sweep"][1]

    @pytest.mark.parametrize(
        ("title", "changes", "values"),
        [
            ("Several revisions of the code", {"git": {"revision": "another"}}, "0123456789abcdef, another"),
            ("Several versions of PyTorch", {"packages": {"torch": "2.9.1"}}, "2.13.0, 2.9.1"),
            ("Several hosts", {"host": {"name": "there", "num_cores": 2}}, "here, there"),
        ],
    )  # fmt: skip
    def test_what_differs_besides_the_axis(
        self, tmp_path: Path, title: str, changes: dict[str, Any], values: str
    ) -> None:
        assert values in warned(self.sweep(tmp_path, **changes))[title][1]

    def test_devices_are_named(self, tmp_path: Path) -> None:
        folder = self.sweep(tmp_path)
        change_manifest(tmp_path / "skew=0.5", device="GPU")
        change_tables(tmp_path / "skew=0.5", device="GPU")
        assert "CPU of tests, GPU" in warned(folder)["Several devices"][1]

    def test_backends_never_share_a_section(self, tmp_path: Path) -> None:
        folder = self.sweep(tmp_path, backend="simulator", hardware_source="x")
        change_tables(tmp_path / "skew=0.5", backend="simulator")
        measured, simulated = sections_of(folder)
        assert [run.manifest["run_id"] for run in measured.runs] == ["skew=0.0"]
        assert [run.manifest["run_id"] for run in simulated.runs] == ["skew=0.5"]
        assert set(measured.frame["backend"]) == {"gloo"}
        assert set(simulated.frame["backend"]) == {"simulator"}
        for section, other in ((measured, "simulator"), (simulated, "gloo")):
            (alert,) = [alert for alert in warnings_of(section) if alert.title == "Several kinds of runs"]
            assert f"({other}, scope model)" in alert.text


def test_systems_in_runs_of_their_own_are_unpaired(tmp_path: Path) -> None:
    runs = ["harmoeny", "static_ep"]
    for name in runs:
        good_run(tmp_path / name, {name: QUIET_S[name]}, run_id=name)
    (section,) = sections_of(write_sweep_of(tmp_path, [{"router.skew": 0.9}] * 2, runs))
    (alert,) = [alert for alert in warnings_of(section) if alert.title == "Unpaired systems"]
    assert alert.level == "warning"
    assert "'system=[harmoeny,static_ep]'" in alert.text
    assert "paired by round" not in measured_on(section)
