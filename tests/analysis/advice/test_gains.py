from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.advice.choose import Verdict, choose
from analysis.advice.document import Document, Part, Picture, Table
from analysis.advice.error import validated_error
from analysis.advice.gains import Gain, gains_of, passes_per_batch, rebalance_s
from analysis.advice.getting import ORIGINS
from analysis.advice.margin import margin_of
from analysis.advice.page import why_nothing
from analysis.data.load import Run, load_run
from analysis.data.stats import ratio_of_sums
from results_schema.advising import ADVISING
from tests.synthetic import write_run

LATENCY_S = {"static_ep": [1.0] * 6, "even_split": [0.5, 2.5, 0.5, 0.5, 2.5, 0.5]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`even_split` places experts anew in rounds 1 and 4 and waits 2 s for it; it is called to know history alone."""
    write_run(tmp_path, latency_s=LATENCY_S)
    found = load_run(tmp_path)
    found.manifest["systems"]["even_split"] |= {"knows": ["history"], "policy": "even_split"}
    found.manifest["systems"]["static_ep"] |= {"knows": []}
    layers = found.layers.assign(fetch_wait_s=0.0, fetch_bytes=0)
    moved = (layers["system"] == "even_split") & layers["round"].isin([1, 4]) & (layers["layer"] == 0)
    layers.loc[moved, "fetch_wait_s"] = 2.0
    layers.loc[moved, "fetch_bytes"] = 100
    return replace(found, layers=layers)


def recorded(run: Run, tokens: int | None) -> Run:
    run.manifest["dataset"] = {"name": "x", "recorded_tokens": tokens}
    return run


def gain(run: Run) -> Gain:
    static, other = gains_of(run)
    assert (static.system, static.gain) == ("static_ep", 1.0)
    return other


def test_waits_count_once_per_recorded_batch(run: Run) -> None:
    np.testing.assert_allclose(rebalance_s(run, "even_split"), [0, 2, 0, 0, 2, 0])
    once = gain(recorded(run, 1000))
    assert passes_per_batch(run) == 1.0
    assert once.gain == pytest.approx(5 / 6.5), "rounds 1 to 5 as they are"
    spread = gain(recorded(run, 10_000))
    assert spread.gain == pytest.approx(5 / (2.5 + 4 / 10))
    assert spread.rebalance_s == pytest.approx(2.0)
    assert spread.rebalances == pytest.approx(2 / 5)
    assert spread.rebalance_bytes == 200, "of both ranks"
    assert spread.saved_s == pytest.approx(0.5)
    assert spread.passes_to_pay == pytest.approx(4.0)
    assert gain(recorded(run, None)).gain == once.gain, "where nothing is known a batch is a pass"


def test_what_plans_by_the_batch_waits_for_new_placements_only_beyond_its_usual(run: Run) -> None:
    run.manifest["systems"]["even_split"]["knows"] = ["exact", "history"]
    run.layers["fetch_wait_s"] += 0.3
    np.testing.assert_allclose(rebalance_s(run, "even_split"), [0, 2, 0, 0, 2, 0])
    run.manifest["systems"]["even_split"]["knows"] = ["exact"]
    assert not rebalance_s(run, "even_split").any()


def test_what_never_pays_says_so(run: Run) -> None:
    slow = replace(gain(run), saved_s=-0.1)
    assert slow.passes_to_pay is None
    assert replace(slow, saved_s=0.5, rebalance_s=0.0).passes_to_pay is None


def test_ratios_of_sums_have_intervals_that_cover_the_truth() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        own = rng.lognormal(0, 0.3, 20)
        _, low, high = ratio_of_sums(own * 1.2 * rng.lognormal(0, 0.05, 20), own)
        hits += low <= 1.2 * np.exp(0.05**2 / 2) <= high
    assert hits >= 170


def make(policy: str, value: float, width: float = 0.01) -> Gain:
    return Gain(policy, policy, value, value - width, value + width, 1.0, 0.0, 0.0, 0.0, 0.1, 10**9)


def at(tokens: int, *gains: Gain) -> Verdict:
    return Verdict(tokens, 2, "as_recorded", sorted(gains, key=lambda g: -g.gain), 0.1)


def test_nothing_inside_the_simulators_error_is_recommended() -> None:
    assert at(64, make("a", 1.1)).best is None, "its interval begins below 1.1"
    assert at(64, make("a", 1.12)).best is not None
    verdict = at(64, make("a", 1.5), make("b", 1.4), make("c", 1.3), make("d", 1.05))
    assert verdict.best is not None
    assert verdict.best.policy == "a"
    assert [g.policy for g in verdict.equals] == ["b"], "1.3 x 1.1 is below 1.5"


def test_advice_differs_where_what_is_used_is_neither_best_nor_as_good() -> None:
    one = at(64, make("a", 1.5), make("b", 1.4))
    assert not one.differs(at(64, make("b", 1.5), make("a", 1.4)))
    assert one.differs(at(64, make("b", 1.5), make("a", 1.3)))
    assert one.differs(at(64, make("a", 1.0)))
    assert not at(64).differs(at(64, make("a", 1.0)))


def test_one_system_is_chosen_for_as_many_sizes_as_possible() -> None:
    sizes = [
        at(1024, make("a", 1.0)),
        at(4096, make("a", 1.3), make("b", 1.28), make("c", 1.25)),
        at(16384, make("b", 1.6), make("c", 1.55), make("a", 1.2)),
    ]
    choice = choose(sizes)
    assert choice is not None
    assert choice.system == "b"
    assert list(choice.gains) == [4096, 16384]
    assert [g.policy for g in choice.equals] == ["c"]
    assert choose(sizes[:1]) is None


def table(path: Path, **columns: Any) -> None:
    pd.DataFrame(columns).to_csv(path, index=False)


def test_the_error_of_gains_is_worked_out_from_the_validation(tmp_path: Path) -> None:
    systems = {"system": ["static_ep", "a", "a"], "case": ["x", "x", "x"], "published": [1.0, 2.0, 4.0]}
    table(tmp_path / "paper_throughputs.csv", **systems, predicted=[1.1, 2.2, 5.5], calibration=[False] * 3)
    table(tmp_path / "ranks.csv", **systems, predicted=[1.0, 2.2, 4.4], calibration=[False, False, True])
    table(
        tmp_path / "gpus.csv",
        system=["static_ep", "balanced", "llep", "llep"], case=["2", "2", "k", "k"],
        unit=["ms", "ms", "speed-up", "speed-up"], calibration=[False, False, False, True],
        published=[4.0, 2.0, 1.5, 1.0], predicted=[4.0, 1.6, 1.8, 9.0], error=[0.0, -0.2, 0.2, 8.0],
    )  # fmt: skip
    table(tmp_path / "gpu_sweep.csv", **systems, predicted=[1.0, 3.0, 9.0], calibration=[False, False, True])
    dgx = validated_error("dgx1_v100", tmp_path)
    assert dgx.median == pytest.approx(0.125), "0 and 5.5 / 1.1 / 4 - 1"
    assert (dgx.points, dgx.is_other) == (2, False)
    h200 = validated_error("dgx_h100", tmp_path)
    assert h200.median == pytest.approx(0.25), "0.2, 4 / 1.6 for 2, and 3 for 2"
    assert h200.points == 3
    assert validated_error("cpu_core", tmp_path).median == pytest.approx(0.1)
    other = validated_error("my_cluster", tmp_path)
    assert (other.median, other.is_other) == (h200.median, True)
    (tmp_path / "gpus.csv").write_text("nothing\n")
    with pytest.raises(ValueError, match="no readable validation"):
        validated_error("dgx_h100", tmp_path)


def test_a_page_is_markdown_and_html_that_fetches_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "figures" / "x.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    parts = [
        Part("One", text=["Text <b>."], table=Table(["a", "b"], [["1", "x|y"]], frozenset({(0, 1)}))),
        Part("Two", bullets=["item"], picture=Picture(picture, "seen"), code="run & go", notes=["small"]),
    ]
    page = Document("Title", ["simulated"], ["Do this."], ["first"], parts)
    text = page.markdown()
    assert "**Do this.**" in text
    assert "| 1 | **x/y** |" in text
    assert "![seen](figures/x.png)" in text
    html = page.html()
    assert "Text &lt;b&gt;." in html
    assert '<td class="strong">x|y</td>' in html
    assert 'src="data:image/png;base64,iVBORw=="' in html
    assert "http://" not in html
    assert "https://" not in html


def test_measured_gains_have_to_exceed_what_the_same_system_differs_by(tmp_path: Path) -> None:
    # FastMoE is static EP under another name; the third system takes three quarters of the time.
    latency_s = {"static_ep": [1.0] * 6, "static_ep_again": [1.2] * 6, "harmoeny": [0.75] * 6}
    write_run(tmp_path, latency_s=latency_s)
    found = load_run(tmp_path)
    for name, behaviour in (("static_ep", "s"), ("static_ep_again", "s"), ("harmoeny", "h")):
        found.manifest["systems"][name]["behaviour"] = behaviour
    margin = margin_of([found])
    assert margin.relative == pytest.approx(0.2)
    assert [one.system for one in gains_of(found)] == ["static_ep", "harmoeny"], "the twin is no system to use"
    simulated = load_run(tmp_path)
    simulated.manifest["backend"] = "simulator"
    with pytest.raises(ValueError, match="ranks and simulator, must be the same"):
        margin_of([found, simulated])
    assert margin_of([simulated]).name == "the simulator's error"


def test_nobody_knows_is_not_does_not_pay() -> None:
    even, wide = at(64, make("a", 1.0)), at(256, make("b", 1.05, width=0.3))
    assert why_nothing([even]) == "balancing does not pay"
    assert why_nothing([even, wide]) == "no gain is certain (the largest: b 1.05 [0.75, 1.35])"


@pytest.mark.parametrize("experiment", ADVISING)
def test_of_every_system_that_may_be_advised_the_page_says_who_has_it(experiment: str) -> None:
    defaults = yaml.safe_load(Path(f"conf/experiment/{experiment}.yaml").read_text(encoding="utf-8"))["defaults"]
    names = next(each["override /system"] for each in defaults if "override /system" in each)
    policies = {"harmoeny_tokens" if name == "harmoeny_paper" else name for name in names}
    assert policies - {"static_ep", "fastmoe"} <= set(ORIGINS)
