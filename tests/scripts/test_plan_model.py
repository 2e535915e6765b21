from pathlib import Path

import numpy as np
import pytest
import yaml

from baselines.eplb import EPLB
from experiments.compose.compose import compose_point
from experiments.compose.help import CONF
from experiments.point.simulator_options import PLAN_TERMS, SoftwareCost
from experiments.registry import discover
from experiments.simulator.cost import CostModel
from experiments.simulator.flows import flows_of_executed
from experiments.simulator.model_work import LayerShape
from experiments.simulator.plan_size import PlanSize, plan_size
from experiments.simulator.topology import Topology
from harmoeny.placement import Placement
from scripts.bench import plan_model
from scripts.bench.plan_model import PRESETS, QWEN, fit


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    rng, wanted = np.random.default_rng(0), np.array([5e-6, 1e-10, 2e-6, 4e-9, 1e-9, 3e-9, 0.0])
    sizes = [
        PlanSize(w * w * e, w * e, int(rng.integers(0, 40)) * moves, copies, staged)
        for w, e in ((8, 128), (8, 256), (32, 128)) for moves in (0, 1) for copies in (False, True)
        for staged in (False, True)
    ]  # fmt: skip
    terms = np.array([size.terms for size in sizes])
    assert fit(np.column_stack([terms @ wanted, terms])) == pytest.approx(wanted, abs=1e-13)


def test_single_plans_that_take_far_longer_decide_nothing() -> None:
    cells = np.linspace(1e3, 1e4, 21)
    measured = np.column_stack([1e-6 + 2e-9 * cells, np.ones(21), cells])
    measured[[3, 10, 17], 0] *= [9.0, 5.0, 3.0]
    assert fit(measured) == pytest.approx([1e-6, 2e-9])


def test_nothing_is_below_zero_and_every_sample_counts_by_its_share() -> None:
    entries = np.array([1.0, 2.0, 1000.0])
    measured = np.column_stack([entries * 1e-6, np.ones(3), entries])
    assert fit(measured) == pytest.approx([0.0, 1e-6], abs=1e-12)
    measured[:, 0] = [3e-6, 2e-6, 1e-6]  # the more, the faster
    assert (fit(measured) >= 0).all()


def test_no_term_takes_less_than_it_has_to() -> None:
    """What is less by itself is as much as it has to be; what is more stays as it is."""
    entries = np.array([1.0, 2.0, 1000.0])
    measured = np.column_stack([1e-6 + entries * 1e-6, np.ones(3), entries])
    assert fit(measured, np.array([2e-6, 0.0]))[0] == pytest.approx(2e-6)
    assert fit(measured, np.array([0.0, 1e-7])) == pytest.approx([1e-6, 1e-6], abs=1e-12)


def test_a_plan_is_as_large_as_what_it_does() -> None:
    """By hand: two ranks, of which one fetches an expert that the other keeps a copy of from before."""
    counts = np.array([[6, 0], [6, 0]])
    placement = Placement(np.array([0, 1]), np.array([[True, False], [True, True]]))
    size = plan_size(flows_of_executed(counts, np.array([[6, 6], [0, 0]]), placement), counts, placement)
    assert list(size) == [8, 4, 1, True, False]
    assert list(size.terms) == [1, 8, 1, 4, 4, 4, 0]
    software = SoftwareCost(
        plan_s=1.0, plan_entry_s=0.5, plan_step_s=3.0, plan_cell_s=2.0, plan_moving_s=0.25, plan_copies_s=0.125,
        plan_stages_s=100.0,
    )  # fmt: skip
    hardware = compose_point("experiment=smoke", "hardware=dgx_h100").hardware
    model = CostModel(hardware, Topology(hardware, 2), QWEN.work(6), software)
    assert model.plan_s(None, size) == 1 + 4 + 3 + 8 + 1 + 0.5
    assert model.plan_s(7.0, size) == 7 + 3


def test_plans_are_timed_where_simulations_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_model, "MACHINES", [("dgx_h100", 4, LayerShape(16, 64, 32, top_k=2))])
    measured = np.array(list(plan_model.samples(EPLB)))
    num = len(plan_model.TOKENS_PER_RANK) * len(plan_model.ROUTINGS) * plan_model.NUM_TIMED
    assert measured.shape == (num, 1 + len(PLAN_TERMS))
    assert (measured[:, 0] > 0).all()
    assert (measured[:, 1:3] == [1, 4 * 4 * 16]).all()
    assert (measured[:, 6] == 4 * 16).any(), "replicas have been placed by then"


def test_every_system_of_the_grid_has_its_plan_times() -> None:
    found = yaml.safe_load(Path(CONF, "simulator", "bench.yaml").read_text())["software"]
    assert set(discover("system")[0]) | set(PRESETS) <= set(found)
