from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.compose.job import run_point
from experiments.compose.sweep_callback import ValidateSweep
from experiments.compose.swept import sweep_points
from experiments.launch.rank import run_rank
from experiments.results.kept import is_done
from experiments.results.run_folder import RunFolder
from experiments.routers.base import CALIBRATION_BATCH, RoutedRun, RoutingRequest, SkippedPoint, exact_counts
from experiments.routers.trace import TraceRouter
from experiments.routing.trace_files import read_trace, write_trace
from experiments.text.tokens import prepare_tokens
from tests.conftest import Compose, Load
from tests.experiments.routing.test_authors_csv import HEADER, ROWS, written
from tests.experiments.routing.test_trace import random_trace
from tests.experiments.runs import begin


def request(num_tokens: int, *, batch: int = 0, layer: int = 0, rank: int = 0, world_size: int = 2) -> RoutingRequest:
    return RoutingRequest(
        num_tokens=num_tokens, num_experts=5, top_k=2, batch=batch, layer=layer, rank=rank, seed=3,
        world_size=world_size,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(random_trace(0, world_size=2, path=str(path))[0], "run")
    return path


@pytest.fixture
def counts_only(tmp_path: Path) -> Path:
    path = tmp_path / "counts.parquet"
    write_trace(random_trace(0, world_size=2, token_paths=False, path=str(path))[0], "run")
    return path


def test_token_paths_are_replayed_token_by_token(path: Path) -> None:
    router, (_, ids) = TraceRouter(path=str(path)), random_trace(0, world_size=2)
    for batch, layer, rank in np.ndindex(2, 3, 2):
        wanted = ids[rank][batch][layer]
        asked = request(len(wanted), batch=batch, layer=layer, rank=rank)
        np.testing.assert_array_equal(router.assign(asked), wanted)
        np.testing.assert_array_equal(router.count(asked), [np.count_nonzero(wanted == e) for e in range(5)])
    # Calibration looks at other batches than the measurement: the last ones.
    np.testing.assert_array_equal(router.assign(request(12, batch=CALIBRATION_BATCH, rank=1)), ids[1][1][0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_are_replayed_exactly_with_different_experts_per_token(counts_only: Path, world_size: int) -> None:
    router, trace = TraceRouter(path=str(counts_only)), read_trace(counts_only)
    total = np.zeros(5, dtype=np.int64)
    for rank in range(world_size):
        asked = request(24 // world_size, rank=rank, world_size=world_size)
        ids = router.assign(asked)
        assert ids.shape == (24 // world_size, 2)
        assert (ids[:, 0] != ids[:, 1])[(ids >= 0).all(axis=1)].all()
        counts = np.array([np.count_nonzero(ids == e) for e in range(5)])
        np.testing.assert_array_equal(router.count(asked), counts)
        total += counts
    np.testing.assert_array_equal(total, trace.counts[0, 0].sum(axis=0))


def test_scaled_shares_are_those_recorded(counts_only: Path) -> None:
    router, recorded = TraceRouter(path=str(counts_only), scale=True), read_trace(counts_only).counts[0, 0].sum(axis=0)
    counts = router.count(request(7000))
    assert counts.sum() == 14_000
    np.testing.assert_allclose(counts / counts.sum(), recorded / recorded.sum(), atol=1e-3)


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (10, 2), (15, 1), (3, 1)])
def test_recorded_shares_are_given_to_models_of_other_sizes(path: Path, num_experts: int, top_k: int) -> None:
    router, trace = TraceRouter(path=str(path), adapt=True), read_trace(path)
    router.validate(num_experts, top_k)
    router.validate_run(run([7000] * 8, learners={"libra": 1}, num_batches=1))
    asked = [
        RoutingRequest(
            num_tokens=7000, num_experts=num_experts, top_k=top_k, batch=1, layer=layer, rank=0, seed=0, world_size=4
        )
        for layer in (1, 1 + trace.num_layers)
    ]
    shares = trace.counts[1, 1].sum(axis=0) / trace.counts[1, 1].sum()
    # Every recorded expert is cut into as many pieces as the model has experts, and an expert gets five of them.
    pieces = np.repeat(shares / num_experts, num_experts).reshape(num_experts, -1).sum(axis=1)
    expected = exact_counts(pieces, 7000, top_k, asked[0].generator())
    counts = router.count(asked[0])
    np.testing.assert_allclose(counts, expected, atol=1)
    np.testing.assert_allclose(router.count(asked[1]), counts, atol=1)  # layers take the recorded ones in turn
    assert counts.sum() == 7000 * top_k
    np.testing.assert_array_equal(np.bincount(router.assign(asked[0]).ravel(), minlength=num_experts), counts)


def test_a_trace_that_is_adapted_still_has_to_be_long_enough(path: Path) -> None:
    with pytest.raises(ValueError, match="rounds: 3, must be at most 2"):
        TraceRouter(path=str(path), adapt=True).validate_run(run(num_batches=3))


def run(
    tokens: list[int] | None = None, world_size: int = 2, num_batches: int = 2, learners: dict[str, int] | None = None
) -> RoutedRun:
    return RoutedRun(tokens or [12, 12, 3], world_size, num_batches, learners or {})


def test_what_a_trace_cannot_give_is_refused(path: Path, counts_only: Path) -> None:
    router = TraceRouter(path=str(path))
    router.validate(5, 2)
    router.validate_run(run())
    router.validate_run(run(num_batches=1, learners={"exflow": 1}))
    refused: list[tuple[Callable[[], None], str]] = [
        (lambda: router.validate(8, 2), "router.path: .* has num_experts=5, must be model.num_experts=8"),
        (lambda: router.validate(5, 1), "router.path: .* has top_k=2, must be model.top_k=1"),
        (lambda: router.validate_run(run([12, 12])), "router.path: .* has 3 MoE layers, must be 2, as the model has"),
        (lambda: router.validate_run(run(num_batches=3)), "rounds: 3, must be at most 2: .* has 2 batches"),
        (lambda: router.validate_run(run(learners={"exflow": 1})), "rounds: 2, must be at most 1: .* has 2 batches"),
        (lambda: router.validate_run(run([12, 12, 4])), r"router.path: .* has \[3, 3\] tokens .* layer 2, must be 4"),
        (lambda: router.validate_run(run(world_size=4)), r"router.path: .* has \[6, 6, 6, 6\] tokens .*, must be 12"),
        (lambda: TraceRouter(path=str(path), case="x").validate(5, 2), "router.case: 'x', must be null"),
        (
            lambda: TraceRouter(path=str(counts_only)).validate_run(run(num_batches=1, learners={"exflow": 1})),
            "systems.exflow: learns from the paths of tokens, which .* does not have",
        ),
        (lambda: TraceRouter().validate(5, 2), "router.path: '', must be a recorded routing"),
        (lambda: TraceRouter(path=__file__).validate(5, 2), "router.path: .*test_trace.py: no readable Parquet file"),
        (lambda: TraceRouter(path="/no/trace").validate(5, 2), "router.path: '/no/trace' does not exist"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    TraceRouter(path=str(path), scale=True).validate_run(run([99, 99, 99], world_size=3))
    with pytest.raises(SkippedPoint, match=r"^router.path: '/no/trace' does not exist, so there is nothing to replay"):
        TraceRouter(path="/no/trace", optional=True).validate(5, 2)


def test_published_routing_is_replayed(tmp_path: Path) -> None:
    router = TraceRouter(path=str(written(tmp_path, ROWS, HEADER)), case="books")
    router.validate(3, 1)
    router.validate_run(run([2, 2], world_size=3))
    requests = [
        RoutingRequest(num_tokens=2, num_experts=3, top_k=1, batch=1, layer=0, rank=rank, seed=0, world_size=3)
        for rank in range(3)
    ]
    total = sum(router.count(request) for request in requests)
    assert np.asarray(total).tolist() == [1, 4, 1]


def test_the_runs_name_follows_the_file(path: Path, load: Load) -> None:
    options = (
        "model=moe_stack", "model.num_experts=5", "model.top_k=2", "model.num_layers=3", "router=trace",
        f"router.path={path}", "router.scale=true", "rounds=2",
    )  # fmt: skip
    before = load(*options).run_id
    assert re.fullmatch(r"trace-scale=True-\w{8}", before)
    write_trace(random_trace(1, world_size=2, path=str(path))[0], "run")
    assert load(*options).run_id != before


def test_a_recorded_run_replays_to_the_same_plans(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    path, text = tmp_path / "trace.parquet", tmp_path / "text"
    text.write_text("A text whose vocabulary is soon found. " * 200, encoding="utf-8")
    common = (
        "model=switch_tiny", "world_size=1", "batch_size=2", "seq_len=32", "rounds=2", "warmup_rounds=0",
        "system=[harmoeny,drop]", "dataset=local", f"dataset.path={text}",
    )  # fmt: skip
    layers = {}
    for name, options in {
        "recorded": ("router=model", f"trace.record={path}", "trace.token_paths=true"),
        "replayed": ("router=trace", f"router.path={path}"),
    }.items():
        point = load(*common, *options)
        tokens = prepare_tokens(point.dataset, point.model.vocab_size)
        assert not is_done(point)
        run_rank(begin(point), tokens)
        assert is_done(point)
        layers[name] = pd.read_parquet(point.folder / "layers.parquet").set_index(["system", "round", "layer"])
    for column in ("num_assignments", "executed_tokens", "dropped_tokens", "num_active_experts"):
        pd.testing.assert_series_equal(layers["replayed"][column], layers["recorded"][column])
    trace = read_trace(path)
    assert (trace.model, trace.dataset, trace.num_experts) == ("switch", "local", 4)
    manifest = RunFolder(point.folder).manifest
    assert manifest["dataset"]["name"] == "local"
    recorded = load(*common, "router=model", f"trace.record={path}")
    path.unlink()
    assert not is_done(recorded)  # the run is there, but not what it was to write


def test_recording_is_checked_before_anything_runs(path: Path, load: Load) -> None:
    for options, message in {
        ("trace.token_paths=true",): "trace.token_paths: true, must be false without trace.record=PATH",
        ("trace.record=a.csv",): "trace.record: 'a.csv', must be a path that ends in .parquet",
        (f"trace.record={path}",): "trace.record: '.*' holds another run's routing, must be a new file",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            load("model=switch_tiny", *options)


def test_without_the_authors_files_the_experiment_is_skipped_with_the_reason(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("experiment=trace_replay", "router.path=/no/file.csv", f"results_dir={tmp_path}", multirun=True)
    with pytest.raises(SystemExit) as caught:
        ValidateSweep().on_multirun_start(config)
    assert caught.value.code == 0
    assert capsys.readouterr().err == (
        "skipped: router.path: '/no/file.csv' does not exist, so there is nothing to replay\n"
    )
    assert run_point(compose("experiment=trace_replay", "router.path=/no/file.csv", f"results_dir={tmp_path}")) is None
    assert not list(tmp_path.rglob("*.json"))


def test_a_sweep_goes_on_without_points_that_may_be_left_out(compose: Compose, path: Path, tmp_path: Path) -> None:
    options = (
        "router=trace", "router.adapt=true", "router.optional=true", "model=moe_stack", "backend=simulator",
        "hardware=dgx1_v100", "system=[static_ep]", "rounds=1", f"results_dir={tmp_path}",
    )  # fmt: skip
    points, axes = sweep_points(compose(*options, f"router.path=/no/file.csv,{path}", multirun=True))
    assert axes == ["router.path"]
    assert [values for _, values in points] == [{"router.path": str(path)}]
    with pytest.raises(SkippedPoint, match=r"/no/file.csv' does not exist.*; .*/nor/this.csv' does not exist"):
        sweep_points(compose(*options, "router.path=/no/file.csv,/nor/this.csv", multirun=True))


def test_a_replay_is_named_after_what_was_recorded(path: Path, load: Load) -> None:
    replay = load(
        "model=moe_stack", "model.num_layers=3", "model.num_experts=5", "model.top_k=2", "router=trace",
        f"router.path={path}", "router.scale=true", "dataset=random", "system=[static_ep]", "rounds=1",
    )  # fmt: skip
    assert replay.dataset_name == "text"
    assert load("dataset=random").dataset_name == "random"


@pytest.mark.parametrize(
    ("rounds", "learners", "message"),
    [
        (
            3,
            {"exflow": 4},
            r"^systems\.exflow: learns from 4 batches that are not measured, but '.*' has 2 batches: leave it out, or "
            r"record at least 7 rounds$",
        ),
        (1, {"exflow": 2}, r"^systems\.exflow: learns from 2 batches .* record at least 3 rounds$"),
        (
            2,
            {"exflow": 1, "other": 0},
            r"^rounds: 2, must be at most 1: '.*' has 2 batches, of which systems\.exflow learns from 1, and none is "
            r"used twice$",
        ),
        (3, {}, r"^rounds: 3, must be at most 2: '.*' has 2 batches$"),
    ],
)
def test_too_few_batches_are_refused_with_what_takes_them(
    rounds: int, learners: dict[str, int], message: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TraceRouter(path=str(path), scale=True).validate_run(RoutedRun([12, 12, 3], 2, rounds, learners))
