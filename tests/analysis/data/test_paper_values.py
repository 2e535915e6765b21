import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from analysis.data.load import Run, load_run
from analysis.data.paper_values import FOLDER, TABLES, change_text, load_published, on_papers_machine
from analysis.data.summary import summarise
from analysis.figures import dataset_sweep, policy_sweep, skew_response, skew_sweep, threshold_sweep, time_breakdown
from analysis.figures.kit import bars
from analysis.figures.kit.base import FigureData
from analysis.present.table import summary_frame
from experiments.compose.compose import compose_point
from experiments.compose.help import CONF
from experiments.routers.base import RoutingRequest
from tests.synthetic import write_routing, write_run

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "reference" / "harmoeny-paper"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the authors' data are not in {REFERENCE}")
OURS = {
    "harmony": "harmoeny", "deepspeed": "static_ep", "exflow": "exflow", "drop": "drop", "even_split": "even_split",
    "fastmoe": "fastmoe", "fastermoe": "fastermoe", "deepspeed-inference": "deepspeed_moe",
}  # fmt: skip
#: Four digits were typed.
ROUNDING = 6e-4
SKEWS = (0.0, 0.5, 0.9)
PAPERS_MODEL = {
    "name": "transformers", "num_moe_layers": 12, "num_experts": 128, "top_k": 1, "expert_bytes": 18_874_368,
}  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize("table", ["skew", "datasets"])
    def test_throughput_latency_and_batches_agree(self, table: str) -> None:
        frame = load_published(table)
        assert (frame["num_sequences"] == frame["batch_size"] * frame["world_size"]).all()
        assert (frame["input_tokens"] == frame["num_sequences"] * 1024).all()
        processed = frame["throughput_tokens_per_s"] * frame["ttft_s"]
        np.testing.assert_allclose(processed, frame["input_tokens"], rtol=2 * ROUNDING)

    def test_every_system_is_there_for_every_case(self) -> None:
        for table, axis, cases in (("skew", "router.skew", 3), ("datasets", "dataset", 4)):
            frame = load_published(table)
            assert set(frame["system"]) == set(OURS.values())
            assert (frame.groupby("system")[axis].nunique() == cases).all()

    def test_phases_add_up_to_the_layer(self) -> None:
        frame = load_published("breakdown")
        phases = ["route_s", "metadata_s", "plan_s", "dispatch_s", "compute_s", "combine_s"]
        np.testing.assert_allclose(frame[phases].sum(axis=1), frame["layer_s"], rtol=1e-3)
        assert (frame["idle_s"] < frame["combine_s"]).all()
        assert (frame["compute_max_s"] > frame["compute_s"]).all()

    def test_timeline_has_every_batch_once(self) -> None:
        frame = load_published("timeline")
        for _, rows in frame.groupby("system"):
            assert rows["num_batches"].sum() == 180
            assert rows["gini_low"].tolist() == [0, *rows["gini_high"].tolist()[:-1]]
            assert rows["gini_high"].iloc[-1] == 1
        names = [f"throughput_tokens_per_s{end}" for end in ("_min", "", "_max")]
        assert (frame[names].diff(axis=1).iloc[:, 1:] > 0).all(axis=None)

    def test_claims_are_the_abstracts(self) -> None:
        rows = load_published("claims").set_index("claim").to_dict("index")
        assert {name: change_text(row) for name, row in rows.items()} == {
            "throughput": "+37 % to +70 %",
            "ttft": "-34 % to -41 %",
            "idle": "up to -84 %",
        }

    @pytest.mark.parametrize("table", TABLES)
    def test_every_row_says_where_it_comes_from(self, table: str) -> None:
        frame = load_published(table)
        assert frame["source"].str.match(r"(arXiv \d{4}\.\d{5}|sacs-epfl/HarMoEny): \S").all()
        if "backend" in frame:
            assert set(frame["backend"]) == {"published"}
            assert set(frame["device"]) == {"8 x V100 32 GB"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.drop(columns="ttft_s"), "column 'ttft_s' is missing"),
            (lambda f: f.assign(ttft_s=-1.0), "ttft_s is -1.0, must be a number above 0"),
            (lambda f: f.assign(ttft_s="fast"), "ttft_s is 'fast', must be a number above 0"),
            (lambda f: f.assign(source=None), "a row has no source"),
            (lambda f: pd.concat([f, f]), "48 rows, must be at least 1 and one per system and router.skew"),
        ],
    )
    def test_a_damaged_file_is_refused_by_name(self, change: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "switch128_skew.csv"
        change(pd.read_csv(FOLDER / path.name)).to_csv(path, index=False)
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
            load_published("skew", tmp_path)

    def test_an_unknown_table_is_refused(self) -> None:
        with pytest.raises(ValueError, match="published: 'latency', must be one of claims, skew"):
            load_published("latency")


@needs_reference
class TestAgainstTheAuthorsFiles:
    @pytest.mark.parametrize(
        ("table", "axis", "suffixes"),
        [
            ("skew", "router_skew", ("systems_skew", "policies_skew", "policy_skew")),
            ("datasets", "dataset", ("systems_datasets", "systems_dataset", "policies_datasets", "policy_datasets")),
        ],
    )
    def test_throughput_and_latency(self, table: str, axis: str, suffixes: tuple[str, ...]) -> None:
        ours = load_published(table).rename(columns={"router.skew": "router_skew"}).set_index(["system", axis])
        checked: dict[str, set[Any]] = {"throughput": set(), "mttft": set()}
        for quantity, suffix in ((q, s) for q in checked for s in suffixes):
            path = REFERENCE / f"{quantity}_switch128_{suffix}.csv"
            for row in pd.read_csv(path).to_dict("records") if path.exists() else ():
                key = (OURS[str(row.get("system_name") or row["scheduling_policy"])], row[axis])
                checked[quantity].add(key)
                found = ours.loc[key]
                if quantity == "throughput":
                    expected, value = row["throughput (toks/s)"] * 1024, found["throughput_tokens_per_s"]
                else:
                    expected, value = row["MTTFT (ms)"] / 1e3 * found["num_sequences"], found["ttft_s"]
                    assert found["num_batches"] == row["num samples"]
                # Their latencies were averaged apart, and FastMoE's differ from batch to batch on data sets.
                varies = table == "datasets" and key[0] in ("fastmoe", "fastermoe")
                tolerance = ROUNDING if quantity == "throughput" else 0.025 if varies else 2e-3
                assert value == pytest.approx(expected, rel=tolerance), key
        assert checked["throughput"] == checked["mttft"] == set(ours.index)

    @pytest.mark.parametrize(
        ("system", "name"), [("static_ep", "no-sched"), ("harmoeny_sync", "sync"), ("harmoeny", "async")]
    )
    def test_breakdowns(self, system: str, name: str) -> None:
        rows = pd.read_csv(REFERENCE / "timebreakdown" / f"switch128-harmony-{name}.csv")
        ours = load_published("breakdown").set_index(["system", "stack"])
        for stack, layers in (("encoder", range(6)), ("decoder", range(6, 12))):
            means = rows[rows["layer"].isin(layers)].mean() / 1e3
            for column, theirs in {
                "route_s": "other latency (ms)", "metadata_s": "metadata latency (ms)",
                "plan_s": "schedule latency (ms)", "dispatch_s": "first transfer latency (ms)",
                "compute_s": "comp latency (ms)", "idle_s": "wait latency (ms)", "layer_s": "latency (ms)",
            }.items():  # fmt: skip
                assert ours.loc[(system, stack), column] == pytest.approx(means[theirs], rel=5e-3), column
            combine = means["second transfer latency (ms)"] + means["wait latency (ms)"]
            assert ours.loc[(system, stack), "combine_s"] == pytest.approx(combine, rel=5e-3)

    def test_thresholds(self) -> None:
        theirs = pd.read_csv(REFERENCE / "eq_tokens_duration.csv").set_index("eq_tokens")["duration (s)"].sort_index()
        ours = load_published("threshold").set_index("threshold")["duration_s"]
        pd.testing.assert_index_equal(ours.index, theirs.index, check_names=False)
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING)

    def test_timeline(self) -> None:
        gini = pd.read_csv(REFERENCE / "switch128-policies-timeline-gini-index.csv")["gini index"].to_numpy()
        for system, rows in load_published("timeline").groupby("system"):
            file, column = rows["source"].iloc[0].removeprefix("sacs-epfl/HarMoEny: "), "throughput (toks/s)"
            theirs = pd.read_csv(REFERENCE / file).iloc[:, [1, 2]].set_axis([column, "name"], axis=1)
            series = theirs[theirs["name"].map(OURS) == system][column].to_numpy() * 1024
            for row in rows.to_dict("records"):
                part = series[(gini >= row["gini_low"]) & (gini < row["gini_high"])]
                assert row["num_batches"] == len(part)
                expected = [1 / np.mean(1 / part), part.min(), part.max()]
                found = [row[f"throughput_tokens_per_s{end}"] for end in ("", "_min", "_max")]
                assert found == pytest.approx(expected, rel=ROUNDING)


class TestExperiments:
    """The simulated counterparts of the published figures have their conditions."""

    def test_paper_skew_has_the_published_systems_and_batches(self) -> None:
        published = load_published("skew").set_index(["system", "router.skew"])["batch_size"]
        point = compose_point("experiment=paper_skew")
        for skew in SKEWS:
            sizes = {s: point.simulator.batch_size_of(s, point.options.batch_size, skew) for s in point.systems}
            assert sizes == published.xs(skew, level=1).to_dict()
        assert (point.options.world_size, point.options.seq_len, point.hardware.name) == (8, 1024, "dgx1_v100")

    def test_paper_datasets_has_the_published_batches(self) -> None:
        config = yaml.safe_load((CONF / "experiment" / "paper_datasets.yaml").read_text())
        published = load_published("datasets").groupby("system")["batch_size"].first()
        default, others = config["batch_size"], config["simulator"]["batch_size"]
        assert {name: others.get(name, default) for name in published.index} == published.to_dict()

    def test_paper_breakdown_gives_ten_experts_nine_tenths(self) -> None:
        point = compose_point("experiment=paper_breakdown")
        request = RoutingRequest(
            num_tokens=48 * 1024, num_experts=128, top_k=1, batch=0, layer=0, rank=0, seed=0, world_size=8
        )
        counts = point.router.count(request)
        assert counts[:10].sum() / counts.sum() == pytest.approx(0.9, abs=1e-3)
        assert set(point.systems) == set(load_published("breakdown")["system"])
        assert point.systems["harmoeny_sync"].fetch == "sync"
        assert point.simulator.software["harmoeny_sync"] == point.simulator.software["harmoeny"]


def paper_run(folder: Path, *, skew: float = 0.9, batches: dict[str, int] | None = None, **router: Any) -> Run:
    """A run as if it had been on the paper's machine and model, with ``batches`` sequences per GPU and system."""
    run = load_run(write_run(folder, latency_s={"static_ep": [4.0, 4.0], "harmoeny": [2.0, 2.0]}, skew=skew).folder)
    batches = batches or {"harmoeny": 64, "static_ep": {0.0: 64, 0.5: 32, 0.9: 18}[skew]}
    manifest = run.manifest | {"world_size": 8, "device": "dgx1_v100", "model": PAPERS_MODEL}
    config = run.config | {
        "seq_len": 1024,
        "model": {"hub_name": "google/switch-base-128"},
        "router": {"_target_": "experiments.routers.paper_skew.PaperSkewRouter", "skew": skew} | router,
    }
    iterations = run.iterations.assign(num_sequences=run.iterations["system"].map(batches) * 8)
    return dataclasses.replace(run, manifest=manifest, config=config, iterations=iterations)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The paper's sweep over the skew."""
    folder = tmp_path_factory.mktemp("paper")
    return [paper_run(folder / str(skew), skew=skew) for skew in SKEWS]


def data_of(runs: list[Run], points: list[dict[str, Any]], published: bool | None = None) -> FigureData:
    frame = summary_frame(runs, [summarise(run) for run in runs], points)
    return FigureData(frame, list(points[0]), "Caption.", runs, published)


def markers(axes: Axes) -> dict[float, float]:
    """Published values by place."""
    points = [np.asarray(line.get_xydata()) for line in axes.lines if line.get_label() == bars.PUBLISHED]
    return {round(float(x), 6): float(y) for line in points for x, y in line if not np.isnan(y)}


def bar_centres(axes: Axes, name: str) -> list[float]:
    (container,) = [c for c in axes.containers if isinstance(c, BarContainer) and c.get_label() == name]
    return [round(patch.get_x() + patch.get_width() / 2, 6) for patch in container]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("world_size", 4),
        ("device", "dgx_h100"),
        ("model", PAPERS_MODEL | {"num_experts": 64}),
        ("model", PAPERS_MODEL | {"expert_bytes": 18_874_368 // 2}),
        ("seq_len", 512),
    ],
)
def test_only_the_papers_machine_and_model_share_an_axis(field: str, value: Any, runs: list[Run]) -> None:
    run = runs[0]
    assert on_papers_machine(run)
    if field in run.manifest:
        changed = dataclasses.replace(run, manifest=run.manifest | {field: value})
    else:
        changed = dataclasses.replace(run, config=run.config | {field: value})
    assert not on_papers_machine(changed)


class TestSkewSweep:
    POINTS = ({"router.skew": 0.0}, {"router.skew": 0.5}, {"router.skew": 0.9})

    def test_open_markers_stand_on_the_bars_at_the_published_values(self, runs: list[Run]) -> None:
        published = load_published("skew").set_index(["system", "router.skew"])
        figure = skew_sweep.plot(data_of(runs, list(self.POINTS)))
        throughput, ttft = figure.axes
        for axes, column in ((throughput, "throughput_tokens_per_s"), (ttft, "ttft_s")):
            drawn = markers(axes)
            assert len(drawn) == 6
            for system, name in (("harmoeny", "HarMoEny"), ("static_ep", "Static EP")):
                for place, skew in zip(bar_centres(axes, name), SKEWS, strict=True):
                    row = published.xs((system, skew))
                    # Batches differ here, so time to first token is per sequence, as in the paper.
                    per_sequence = row["ttft_s"] / row["num_sequences"] * 1e3
                    expected = row[column] / 1e3 if column == "throughput_tokens_per_s" else per_sequence
                    assert drawn[place] == pytest.approx(expected)
        caption = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
        assert "Batches differ by system. Open markers: published, arXiv 2506.12417, 8 x V100." in caption

    def test_numbers_behind_it_have_the_published_ones(self, runs: list[Run]) -> None:
        table = skew_sweep.table(data_of(runs, list(self.POINTS))).set_index(["system", "router.skew"])
        assert table.loc[("harmoeny", 0.9), "published_throughput_tokens_per_s"] == 209800
        assert "published_throughput_tokens_per_s" not in skew_sweep.table(data_of(runs, list(self.POINTS), False))

    def test_a_published_value_of_another_batch_is_not_drawn(self, runs: list[Run]) -> None:
        iterations = runs[2].iterations.assign(num_sequences=512)
        others = [*runs[:2], dataclasses.replace(runs[2], iterations=iterations)]
        axes = skew_sweep.plot(data_of(others, list(self.POINTS))).axes[0]
        assert bar_centres(axes, "Static EP")[2] not in markers(axes)
        assert bar_centres(axes, "HarMoEny")[2] in markers(axes)

    @pytest.mark.parametrize("published", [None, False])
    def test_elsewhere_none_is_drawn_unless_asked_for(self, published: bool | None, runs: list[Run]) -> None:
        other = [dataclasses.replace(r, manifest=r.manifest | {"device": "CPU"}) for r in runs]
        for axes in skew_sweep.plot(data_of(other, list(self.POINTS), published)).axes:
            assert markers(axes) == {}

    def test_elsewhere_ratios_are_drawn_and_nothing_absolute(self, runs: list[Run]) -> None:
        other = [dataclasses.replace(r, manifest=r.manifest | {"device": "CPU"}) for r in runs]
        data = data_of(other, list(self.POINTS), published=True)
        throughput, ttft, relative = skew_sweep.plot(data).axes
        assert markers(throughput) == markers(ttft) == {}
        drawn = markers(relative)
        published = load_published("skew").set_index(["system", "router.skew"])["throughput_tokens_per_s"]
        for place, skew in zip(bar_centres(relative, "HarMoEny"), SKEWS, strict=True):
            assert drawn[place] == pytest.approx(published["harmoeny", skew] / published["static_ep", 0.0])
        (bars_drawn,) = [c for c in relative.containers if isinstance(c, BarContainer) and c.get_label() == "HarMoEny"]
        assert [bar.get_height() for bar in bars_drawn] == pytest.approx([2.0] * 3)  # half of static EP's latency


def test_bars_that_hide_the_others_are_cut_off_and_labelled() -> None:
    axes = Figure().subplots()
    for i, heights in enumerate(([1.0, 2.0], [2.0, 1.5], [40.0, 1.0])):
        axes.bar([i * 0.2, 1 + i * 0.2], heights, 0.2)
    axes.plot([0.4], [50.0], "o", label=bars.PUBLISHED)
    bars.limit_height(axes)
    assert axes.get_ylim() == pytest.approx((0, 2.4))
    assert [text.get_text() for text in axes.texts] == ["40; published 50"]


@pytest.mark.parametrize(("mark", "top"), [(1.0, 2.7), (4.0, 4.2)])
def test_whiskers_that_flatten_the_bars_are_cut_off_and_labelled(mark: float, top: float) -> None:
    axes = Figure().subplots()
    for i, (heights, above) in enumerate((([1.0, 2.0], [0.2, 7.5]), ([2.0, 1.5], [0.1, 0.1]))):
        axes.bar([i * 0.2, 1 + i * 0.2], heights, 0.2, yerr=[[0.1, 0.1], above])
    axes.hlines([mark, 0.5], [0, 1], [0.4, 1.4])
    bars.limit_height(axes)
    assert axes.get_ylim() == pytest.approx((0, top))
    assert [text.get_text() for text in axes.texts] == ["9.5"]


def test_a_long_whisker_that_leaves_bars_readable_stays() -> None:
    axes = Figure().subplots()
    axes.bar([0, 1], [1.0, 2.0], 0.2, yerr=[[0.1, 0.1], [0.1, 1.0]])
    bars.limit_height(axes)
    assert axes.get_ylim()[1] > 3
    assert not axes.texts


def test_datasets_are_compared_where_recorded_routing_is_replayed(tmp_path: Path) -> None:
    target: dict[str, Any] = {"_target_": "experiments.routers.trace.TraceRouter"}
    runs = [paper_run(tmp_path / name, batches={"harmoeny": 64, "static_ep": 64}, **target) for name in ("a", "b")]
    data = data_of(runs, [{"router.case": "wmt19"}, {"router.case": "random"}])
    assert dataset_sweep.missing(data) is None
    axes = dataset_sweep.plot(data).axes[0]
    published = load_published("datasets").set_index(["system", "dataset"])["throughput_tokens_per_s"]
    for place, name in zip(bar_centres(axes, "HarMoEny"), ("wmt19", "random"), strict=True):
        assert markers(axes)[place] == pytest.approx(published["harmoeny", name] / 1e3)
    rows = dataset_sweep.table(data).set_index(["dataset", "system", "metric"])
    assert rows["published"].loc[[("wmt19", "static_ep", "throughput_tokens_per_s")]].tolist() == [191800]


def test_breakdown_is_drawn_below_and_on_the_same_scale_only_for_the_same_run(tmp_path: Path) -> None:
    hot: dict[str, Any] = {"_target_": "experiments.routers.skew.SkewRouter", "num_hot": 10}
    same = paper_run(tmp_path / "same", batches={"harmoeny": 48, "static_ep": 48}, **hot)
    for run, published, panels in ((same, None, 2), (same, False, 1), (paper_run(tmp_path / "other"), None, 1)):
        assert len(time_breakdown.plot(data_of([run], [{}], published)).axes) == panels
    ours, theirs = time_breakdown.plot(data_of([same], [{}])).axes
    assert ours.get_xlim() == theirs.get_xlim()
    ends = {bar.get_x() + bar.get_width() for c in theirs.containers if isinstance(c, BarContainer) for bar in c}
    layers = load_published("breakdown").groupby("system")["layer_s"].mean()
    assert max(ends) == pytest.approx(layers.max() * 1e3, rel=2e-3)
    other, apart = time_breakdown.plot(data_of([paper_run(tmp_path / "other")], [{}], published=True)).axes
    assert other.get_xlim() != apart.get_xlim()
    assert "on its own scale" in apart.get_title(loc="left")


def test_thresholds_are_compared_to_their_own_best(tmp_path: Path) -> None:
    options = {"harmoeny_a": {"threshold": 8}, "harmoeny_b": {"threshold": 64}}
    run = load_run(
        write_run(
            tmp_path,
            latency_s={"harmoeny_a": [2.0] * 3, "harmoeny_b": [1.0] * 3, "static_ep": [4.0] * 3},
            options=options,
        ).folder
    )
    data = data_of([run], [{}], published=True)
    panel = threshold_sweep.plot(data).axes[-1]
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in panel.lines}
    assert dict(lines["Published"].tolist())[4096] == 1
    assert dict(lines["Published"].tolist())[1] == pytest.approx(53.27 / 116)
    (ours,) = [c for c in panel.containers if c.get_label() == "HarMoEny"]
    assert np.asarray(ours.lines[0].get_ydata()).tolist() == [0.5, 1.0]  # type: ignore[attr-defined]
    assert len(threshold_sweep.plot(data_of([run], [{}])).axes) == 2


def test_policies_have_open_markers_at_the_published_values(runs: list[Run]) -> None:
    figure = policy_sweep.plot(data_of(runs, [{"router.skew": skew} for skew in SKEWS]))
    published = load_published("skew").set_index(["system", "router.skew"])["throughput_tokens_per_s"]
    open_lines = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    drawn = sorted(values for line in open_lines if (values := np.asarray(line.get_ydata(), dtype=float).tolist()))
    expected = [[published[system, skew] / 1e3 for skew in SKEWS] for system in ("harmoeny", "static_ep")]
    np.testing.assert_allclose(drawn, expected)


def test_response_to_skew_by_hand(tmp_path: Path) -> None:
    """Two batches of even routing, one in which one expert of four has all; HarMoEny is 2, 4 and 8 times as fast."""
    latency_s = {"static_ep": [8.0, 8.0, 8.0], "harmoeny": [4.0, 2.0, 1.0]}
    folder = tmp_path / "run"
    write_run(folder, latency_s=latency_s)
    write_routing(folder, [[[25] * 4] * 3, [[25] * 4] * 3, [[100, 0, 0, 0]] * 3], [0, 0, 1], "dynamic")
    data = data_of([load_run(folder)], [{}], published=True)
    assert skew_response.missing(data) is None
    rows = skew_response.table(data).set_index("gini_low")
    assert rows["throughput_relative"].to_dict() == {0.0: pytest.approx(3.0), 0.75: pytest.approx(8.0)}
    assert rows["num_batches"].to_dict() == {0.0: 2, 0.75: 1}
    published = load_published("timeline").set_index(["system", "gini_low"])["throughput_tokens_per_s"]
    for low in (0.0, 0.75):
        expected = published["harmoeny", low] / published["static_ep", low]
        assert rows["published_throughput_relative"][low] == pytest.approx(expected)
    assert "published_throughput_relative" not in skew_response.table(data_of([load_run(folder)], [{}]))
    texts = [text.get_text() for text in skew_response.plot(data).legends[0].get_texts()]
    assert texts == ["HarMoEny", "Published"]
