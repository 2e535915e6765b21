"""Figures and the page of whatever systems and points were measured: each is drawn, or says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.data.load import Run, load_run
from analysis.data.summary import summarise
from analysis.figures.kit.base import discover, figure_data
from analysis.present.table import as_text, build_table
from analysis.report.html.page import render_page
from analysis.report.html.section import split_sections
from tests.synthetic import LATENCY_S, NUM_LAYERS, write_routing, write_run

SYSTEMS = {
    "ours alone": ["harmoeny"],
    "static placement alone": ["static_ep"],
    "reference alone": ["ideal"],
    "without ours": ["static_ep", "even_split", "drop", "ideal"],
    "without static placement": ["harmoeny", "even_split", "drop"],
    "two values of an option": ["harmoeny_threshold_8", "harmoeny_threshold_16"],
}
ROUNDS = 2
_SUMMARIES: dict[Path, dict[str, Any]] = {}
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "one run": [{"router.skew": 0.9}],
    "one run without a point": [{}],
    "skews": [{"router.skew": 0.0}, {"router.skew": 0.9}],
    "skews without 0": [{"router.skew": 0.5}, {"router.skew": 0.9}],
    "ranks": [{"world_size": 2}, {"world_size": 4}],
    "ranks and skews": [{"world_size": n, "router.skew": s} for n in (2, 4) for s in (0.0, 0.9)],
    "data sets": [{"dataset": "pydoc"}, {"dataset": "random"}],
    "recorded routing": [{"router.case": "one"}, {"router.case": "two"}],
}


def write(folder: Path, systems: list[str], router: str) -> Run:
    """Write a run whose routing gets more even from round to round."""
    options = {
        name: dict.fromkeys(("threshold", "num_slots"), int(name.rpartition("_")[2]) if name[-1].isdigit() else 4)
        for name in systems
        if name.startswith("harmoeny")
    }
    latency_s = {name: LATENCY_S.get(name, LATENCY_S["harmoeny"])[:ROUNDS] for name in systems}
    write_run(folder, latency_s=latency_s, options=options)
    counts = [[[80 - 70 * r, *[10] * 7]] * NUM_LAYERS for r in range(ROUNDS)]
    write_routing(folder, counts, [0] * NUM_LAYERS, router)
    run = load_run(folder)
    _SUMMARIES[folder] = summarise(run)
    return run


@pytest.fixture(scope="module", params=list(SYSTEMS))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Four runs of one set of systems per router."""
    folder, systems = tmp_path_factory.mktemp("runs"), SYSTEMS[request.param]
    return {
        router: [write(folder / f"{router}-{i}", systems, router) for i in range(4)] for router in ("skew", "model")
    }


@pytest.fixture(autouse=True)
def _summarised_once(runs: dict[str, list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of the same runs take most of the time."""
    monkeypatch.setattr("analysis.figures.kit.base.summarise", lambda run: _SUMMARIES[run.folder])


@pytest.mark.many
@pytest.mark.parametrize(
    ("sweep", "published"), [*((sweep, None) for sweep in SWEEPS), ("skews", True), ("recorded routing", True)]
)
def test_every_figure_is_drawn_or_says_what_it_lacks(
    sweep: str, published: bool | None, runs: dict[str, list[Run]]
) -> None:
    points = SWEEPS[sweep]
    router = "model" if sweep in ("data sets", "recorded routing", "one run without a point") else "skew"
    data = figure_data(runs[router][: len(points)], points, published)
    for module in discover():
        if (reason := module.missing(data)) is None:
            assert len(module.table(data)), module.NAME
            assert module.plot(data).axes, module.NAME
        else:
            assert reason.startswith("needs "), module.NAME


@pytest.mark.many
@pytest.mark.parametrize("sweep", ["one run", "skews"])
def test_table_and_page_are_written(sweep: str, runs: dict[str, list[Run]]) -> None:
    points = SWEEPS[sweep]
    some = runs["skew"][: len(points)]
    frame = figure_data(some, points).summary
    assert as_text(build_table(frame, list(points[0]), "title"))
    assert render_page(split_sections(some, points, frame, "title"), "title", "now")
