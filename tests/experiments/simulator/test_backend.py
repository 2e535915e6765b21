from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.data.load import Run, load_run
from analysis.data.summary import summarise
from experiments.compose.compose import compose_point
from experiments.launch.local import launch
from experiments.point.point import Point
from experiments.simulator.backend import Simulator, simulate
from experiments.simulator.device_memory import OutOfMemoryError
from experiments.text.tokens import prepare_tokens
from harmoeny.predict import Costs
from tests.experiments.runs import begin
from tests.smoke import FIXED_COSTS

SMALL = (
    "experiment=smoke", "world_size=2", "rounds=2", "warmup_rounds=0", "model.num_experts=8", "hardware=emulated_pcie3",
    "hardware.expert_flops_per_s=1e10", "hardware.all_to_all_bytes_per_s=1e9",
)  # fmt: skip


def make_point(results: Path, *overrides: str) -> Point:
    return compose_point(f"results_dir={results}", *overrides)


def run(point: Point) -> Run:
    Simulator().run(begin(point), None)
    return load_run(point.folder)


@pytest.mark.ranks
def test_real_ranks_execute_send_and_fetch_the_same(tmp_path: Path) -> None:
    overrides = (*SMALL, "system=[harmoeny,static_ep,even_split,drop]", FIXED_COSTS, "router.skew=0.6")
    real = make_point(tmp_path, *overrides)
    tokens = prepare_tokens(real.dataset, real.model.vocab_size)
    launch(begin(real), tokens)
    measured = load_run(real.folder)
    simulated = run(make_point(tmp_path, *overrides, "backend=simulator"))
    assert simulated.folder != measured.folder

    assert set(simulated.layers) == set(measured.layers)
    assert set(simulated.iterations) == set(measured.iterations)
    keys = ["system", "round", "layer", "rank"]
    columns = ["num_assignments", "executed_tokens", "sent_tokens", "dropped_tokens", "num_active_experts"]
    columns += ["num_host_fetches", "num_peer_fetches", "fetch_bytes"]
    for column in columns:
        left, right = (r.layers.set_index(keys)[column].sort_index() for r in (measured, simulated))
        assert left.equals(right.astype(left.dtype)), column
    assert simulated.layers["num_host_fetches"].sum() > 0
    assert simulated.layers["dropped_tokens"].sum() > 0
    for run_ in (measured, simulated):  # what the experts were given is what the ranks sent, of every system
        assert run_.routing is not None
        given = run_.routing.set_index(["round", "layer"])["counts"].map(sum)
        sent = run_.layers.groupby(["system", "round", "layer"])["num_assignments"].sum()
        assert all(rows.droplevel("system").equals(given) for _, rows in sent.groupby("system"))
    assert measured.routing is not None
    assert simulated.routing is not None
    assert [list(c) for c in measured.routing["counts"]] == [list(c) for c in simulated.routing["counts"]]
    assert measured.routing["stack"].tolist() == simulated.routing["stack"].tolist()
    assert set(simulated.iterations["backend"]) == {"simulator"}
    assert summarise(simulated)["backend"] == "simulator"


def test_a_system_that_does_not_fit_has_no_rows_but_a_reason(tmp_path: Path) -> None:
    # 8 experts of 16 KiB in 3 layers: all of them resident do not fit where half of them do.
    point = make_point(
        tmp_path, *SMALL, "backend=simulator", "system=[harmoeny,static_ep]", FIXED_COSTS,
        "systems.static_ep.fetch=none", "hardware.device_memory_bytes=6.5e5",
    )  # fmt: skip
    result = run(point)
    assert set(result.iterations["system"]) == {"harmoeny"}
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert "GiB" in manifest["out_of_memory"]["static_ep"]
    assert set(summarise(result)["systems"]) == {"harmoeny"}
    nothing = make_point(tmp_path, *SMALL, "backend=simulator", "hardware.device_memory_bytes=1e3", "tag=none")
    with pytest.raises(OutOfMemoryError, match="harmoeny: rank 0 needs"):
        run(nothing)


def test_a_system_with_wrong_plans_has_no_rows_but_a_reason(tmp_path: Path) -> None:
    bad = ("+systems.bad._target_=tests.experiments.measure.defects.BadPlans", "+systems.bad.defect=loses tokens")
    result = run(make_point(tmp_path, *SMALL, "backend=simulator", "system=[static_ep]", *bad))
    assert set(result.layers["system"]) == set(summarise(result)["systems"]) == {"static_ep"}
    assert result.manifest["failed_systems"]["bad"].startswith("MoE layer 0: plan.tokens: assignments lost at ")


def test_systems_may_have_batches_of_their_own(tmp_path: Path) -> None:
    simulation = simulate(
        make_point(tmp_path, *SMALL, "backend=simulator", "system=[drop,static_ep]", "+simulator.batch_size.drop=5")
    )
    sizes = {it.system: it.num_sequences for it in simulation.iterations}
    assert sizes == {"drop": 5, "static_ep": 2}
    assert all(
        sum(layer["num_assignments"] for layer in it.layers[:1]) == it.num_sequences * 32
        for it in simulation.iterations
    )


def test_a_system_may_hold_its_weights_in_another_type(tmp_path: Path) -> None:
    point = make_point(
        tmp_path, *SMALL, "backend=simulator", "system=[drop,even_split]", "systems.even_split.fetch=async",
        "+simulator.software.drop.dtype=bfloat16",
    )  # fmt: skip
    whole = simulate(point).notes
    # Weights that are resident at home, and the same of both.
    assert whole["drop"]["device_expert_bytes"] * 2 == whole["even_split"]["device_expert_bytes"]


def test_a_gate_that_drops_makes_a_system_inexact(tmp_path: Path) -> None:
    gate = "+simulator.software.static_ep={padded: true, capacity_limit: 1}"
    simulation = simulate(make_point(tmp_path, *SMALL, "backend=simulator", "system=[static_ep,even_split]", gate))
    dropped = {
        name: sum(layer["dropped_tokens"] for it in simulation.iterations for layer in it.layers if it.system == name)
        for name in ("static_ep", "even_split")
    }
    assert dropped["static_ep"] > 0 == dropped["even_split"]
    assert {name: notes["exact"] for name, notes in simulation.notes.items()} == {
        "static_ep": False,
        "even_split": True,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend=real", "backend: 'real', must be one of ranks, simulator"),
        ("hardware.expert_flops_per_s=null", "hardware.expert_flops_per_s: null, must be set for backend=simulator"),
        ("hardware.all_to_all_bytes_per_s=null", "hardware.all_to_all_bytes_per_s: null"),
        ("+simulator.batch_size.drop=0", "simulator.batch_size.drop: 0, must be at least 1"),
        ("+simulator.software.drop.layer_s=-1", "simulator.software.drop.layer_s: -1"),
        (
            "+simulator.software.drop.dtype=int8",
            "simulator.software.drop.dtype: 'int8', must be one of float32",
        ),
        ("hardware.kernel=auto", "hardware.kernel: 'auto', must be one of loop, grouped_mm, triton"),
        ("hardware.peer_efficiency=2", "hardware.peer_efficiency: 2"),
        ("hardware.ranks_per_node=0", "hardware.ranks_per_node: 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_point(tmp_path, *SMALL, "backend=simulator", override)


def test_the_manifest_gives_the_options_that_calibration_filled_in(tmp_path: Path) -> None:
    result = run(make_point(tmp_path, *SMALL, "backend=simulator", "system=[harmoeny,static_ep]"))
    system = result.manifest["systems"]["harmoeny"]
    assert set(system["options"]["costs"]) == set(Costs._fields)
    given = run(make_point(tmp_path, *SMALL, "backend=simulator", "system=[harmoeny]", FIXED_COSTS))
    assert given.manifest["systems"]["harmoeny"]["options"]["costs"]["fetch_s"] == 4e-6


def test_it_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = make_point(tmp_path, *SMALL, "backend=simulator", "system=[harmoeny,static_ep]")
    run(point)
    assert capsys.readouterr().err.splitlines() == [
        f"{point.run_id}: simulating harmoeny (1 of 2)",
        f"{point.run_id}: simulating static_ep (2 of 2)",
    ]
    simulate(point)
    assert capsys.readouterr().err == "", "scripts ask for silence"
