from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.data.stats import median_interval, paired_ratio
from analysis.present.style import label
from analysis.present.table import significant
from analysis.report.html.page import render_page
from analysis.report.html.write import write_report
from tests.analysis.report.html.results import good_run, section_of, sections_of, write_sweep_of
from tests.synthetic import (
    LATENCY_S,
    change_config,
    change_manifest,
    write_rates,
    write_run,
    write_serving,
    write_sweep,
)

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
#: Attributes from which a browser fetches.
FETCHING = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "formaction"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> Iterator[Element]:
        for child in self.children:
            if child.tag == tag and all(child.attributes.get(k.rstrip("_")) == v for k, v in attributes.items()):
                yield child
            yield from child.all(tag, **attributes)

    def words(self) -> str:
        """All text in here, in order of the elements; scripts and styles too."""
        return " ".join([self.text, *(child.words() for child in self.children)])


class Tree(HTMLParser):
    """The page as a browser would read it."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("document", {})
        self._open = [self.root]
        self.feed(page)
        assert [element.tag for element in self._open] == ["document"], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data


def render(folder: Path) -> str:
    return render_page(sections_of(folder), "title", "now")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("results"), [0.0, 0.9])


@pytest.fixture(scope="module")
def page(sweep: Path) -> str:
    return render(sweep)


@pytest.fixture(scope="module")
def root(page: str) -> Element:
    return Tree(page).root


def test_table_holds_medians_and_intervals_of_the_parquet_files(sweep: Path, root: Element) -> None:
    (table,) = root.all("table", class_="comparison")
    titles = [element.text for element in table.all("th", scope="col")][1:]
    groups = list(table.all("tbody"))
    assert [next(body.all("span")).text for body in groups] == ["router skew 0", "router skew 0.9"]
    for skew, body in zip((0.0, 0.9), groups, strict=True):
        rows = pd.read_parquet(sweep.parent.parent / f"skew={skew}" / "iterations.parquet").set_index("round")
        layers = pd.read_parquet(sweep.parent.parent / f"skew={skew}" / "layers.parquet")
        shown = {row.attributes["data-system"]: row for row in body.all("tr") if "data-system" in row.attributes}
        assert list(shown) == list(LATENCY_S)
        static = rows[rows["system"] == "static_ep"]["throughput_tokens_per_s"]
        for system, row in shown.items():
            cells = dict(zip(titles, (re.sub(r"\s+", " ", td.words()).strip() for td in row.all("td")), strict=True))
            mine = rows[rows["system"] == system]
            throughput = median_interval(mine["throughput_tokens_per_s"])
            ttft = median_interval(mine["ttft_s"])
            ratio = paired_ratio(mine["throughput_tokens_per_s"], static)
            sums = layers[layers["system"] == system].groupby("iteration")[["idle_s", "layer_s"]].sum()
            idle = median_interval(sums["idle_s"] / sums["layer_s"])
            for title, estimate, text in (
                ("Throughput, tokens/s", throughput, "{:,.0f}".format),
                ("TTFT, s", ttft, significant),
                ("Idle share", idle, "{:.1%}".format),
                ("Throughput to best baseline", ratio, "{:.2f}".format),
            ):
                middle, low, high = text(estimate.median), text(estimate.low), text(estimate.high)
                interval = "" if low == middle == high else f" [{low}, {high}]"
                assert cells[title] == middle + interval, (skew, system, title)


def test_table_marks_baseline_bound_and_what_drops(root: Element) -> None:
    (table,) = root.all("table", class_="comparison")
    marks = {
        (row.attributes["data-system"], badge.text)
        for row in table.all("tr")
        if "data-system" in row.attributes
        for badge in row.all("span")
        if "badge" in str(badge.attributes.get("class"))
    }
    assert marks == {("static_ep", "best baseline"), ("drop", "drops tokens"), ("ideal", "reference")}


def test_all_numbers_can_be_had_as_csv(sweep: Path, root: Element) -> None:
    (link,) = [a for a in root.all("a") if "download" in a.attributes]
    kind, content = str(link.attributes["href"]).split(",", 1)
    assert kind == "data:text/csv;base64"
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
    frame = section_of(sweep).frame
    assert [float(row["latency_s"]) for row in rows] == pytest.approx(frame["latency_s"].tolist())
    assert [row["system"] for row in rows] == frame["system"].tolist()


def test_page_fetches_nothing(page: str, root: Element) -> None:
    for element in every(root):
        for name, value in element.attributes.items():
            assert name not in FETCHING, f"{element.tag} {name}={value}"
            assert not name.startswith("on"), f"{element.tag} {name}={value}"
            if name == "href":
                assert str(value).startswith(("#", "data:text/csv;base64,"))
        assert element.tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
    for style in root.all("style"):
        assert not re.search(r"@import|url\(", style.text)
    (policy,) = root.all("meta", **{"http-equiv": "Content-Security-Policy"})
    directives = [part.split() for part in str(policy.attributes["content"]).split(";")]
    rules = {name: sources for name, *sources in directives}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:", "blob:"]
    assert all(source.startswith("'sha256-") for source in rules["script-src"])
    assert len(rules["script-src"]) == sum(1 for s in root.all("script") if "type" not in s.attributes) == 2


def test_there_is_one_copy_of_plotly(page: str) -> None:
    assert page.count("* plotly.js v") == 1
    assert len(page) < 5.5e6


def every(element: Element) -> Iterator[Element]:
    for child in element.children:
        yield child
        yield from every(child)


def test_a_figure_that_another_process_is_writing_is_left_out(tmp_path: Path) -> None:
    run = good_run(tmp_path / "run")
    (run / "figures").mkdir()
    for name in (".time_breakdown.png.12345678.png", "policy_sweep.png"):
        (run / "figures" / name).write_bytes(name.encode())
    page = write_report(run).read_text(encoding="utf-8")
    assert base64.b64encode(b"policy_sweep.png").decode() in page
    assert base64.b64encode(b".time_breakdown.png.12345678.png").decode() not in page


def test_what_configurations_say_is_text_and_never_markup(tmp_path: Path, root: Element) -> None:
    folder = good_run(tmp_path / "run", {"harmoeny": [1.0] * 5, f"static_ep_{EVIL}": [2.0] * 5})
    change_config(folder, tag=EVIL)
    change_manifest(folder, device=EVIL, experiment=EVIL, dataset={"name": EVIL}, error=EVIL)
    evil = Tree(write_report(folder).read_text(encoding="utf-8")).root
    ours = {element.tag for element in every(root)} | {"caption"}  # of the checks
    assert {element.tag for element in every(evil)} <= ours
    assert len(list(evil.all("script"))) == len(list(root.all("script"))) == 3
    (heading,) = evil.all("h1")
    assert heading.text == f"{EVIL} ({EVIL})"
    (shown,) = evil.all("pre")
    assert yaml.safe_load(shown.text)["tag"] == EVIL
    (plots,) = evil.all("script", id="plots")
    names = {trace["name"] for trace in json.loads(plots.text)["s0"][0]["variants"][0]["figure"]["data"]}
    assert names == {
        "HarMoEny",
        label(f"static_ep_{EVIL}").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    }


def test_configuration_is_all_there_and_what_differs_is_told(sweep: Path, root: Element) -> None:
    shown = [yaml.safe_load(pre.text) for pre in root.all("pre")]
    assert shown == [yaml.safe_load((sweep.parent.parent / f"skew={s}/config.yaml").read_text()) for s in (0.0, 0.9)]
    (table,) = root.all("table", class_="differences")
    rows = [[cell.words().strip() for cell in (*tr.all("th"), *tr.all("td"))] for tr in table.all("tr")]
    assert rows == [["Option", "router skew 0", "router skew 0.9"], ["router.skew", "0", "0.9"]]


def test_environment_comes_from_the_manifests(tmp_path: Path) -> None:
    for name, revision in (("a", "1" * 40), ("b", "2" * 40)):
        good_run(tmp_path / name, git={"revision": revision, "dirty": False})
    folder = write_sweep_of(tmp_path, [{"x": 1}, {"x": 2}], ["a", "b"])
    (found,) = Tree(render(folder)).root.all("dl", class_="environment")
    shown = dict(zip((dt.text for dt in found.all("dt")), (dd.text for dd in found.all("dd")), strict=True))
    assert shown["packages.torch"] == "2.13.0"
    assert shown["device"] == "CPU of tests"
    assert shown["git.revision"] == f"{'1' * 40} | {'2' * 40}"
    assert shown["threads_per_rank"] == "1"


def test_checks_show_the_largest_error(tmp_path: Path) -> None:
    for name, error in (("a", 1e-7), ("b", 3e-7)):
        check = {"relative_error": error, "tolerance": 1e-4, "passed": True}
        good_run(tmp_path / name, checks={"harmoeny": check, "static_ep": check | {"passed": name == "a"}})
    folder = write_sweep_of(tmp_path, [{"x": 1}, {"x": 2}], ["a", "b"])
    (table,) = Tree(render(folder)).root.all("table", class_="checks")
    rows = [[cell.text for cell in (*tr.all("th"), *tr.all("td"))] for tr in table.all("tr")][1:]
    assert rows == [["Static EP", "3.0e-07", "1e-04", "no"], ["HarMoEny", "3.0e-07", "1e-04", "yes"]]


def test_every_plot_says_backend_and_device(root: Element) -> None:
    captions = [caption.text for caption in root.all("figcaption")]
    assert len(captions) == len(list(root.all("figure"))) >= 6
    assert all("gloo, CPU of tests" in caption for caption in captions)


def test_claims_of_the_paper_stand_beside_our_runs_where_the_skew_is_heavy(tmp_path: Path, root: Element) -> None:
    (table,) = root.all("table", class_="claims")
    titles = [next(body.all("span")).text for body in table.all("tbody")]
    assert [title.split(",")[0] for title in titles[:2]] == ["Throughput", "Time to first token per sequence"]
    rows = [[cell.text for cell in (*tr.all("th"), *tr.all("td"))] for tr in next(table.all("tbody")).all("tr")][1:]
    assert {row[0] for row in rows} == {"abstract", "published", "measured"}
    ((_, skew, change, against, _),) = [row for row in rows if row[0] == "measured"]
    assert (skew, change, against) == ("0.9", "+100% [+100%, +100%]", "Static EP")  # in every round twice as fast
    even = Tree(render(good_run(tmp_path / "even", skew=0.0))).root
    assert not list(even.all("table", class_="claims"))


@pytest.mark.parametrize(("factor", "shown"), [(1.0, False), (3.0, True)])
def test_tail_of_the_requests_has_a_column_where_it_is_long(tmp_path: Path, factor: float, shown: bool) -> None:
    folder = good_run(tmp_path / "run", {name: [1.0] * 5 for name in ("harmoeny", "static_ep")})
    write_serving(folder, ["harmoeny", "static_ep"], num_rounds=5)  # 55 requests: too few for more than a p90, 5.46 s
    iterations = pd.read_parquet(folder / "iterations.parquet")
    iterations.assign(ttft_s=6.0 / factor).to_parquet(folder / "iterations.parquet", index=False)
    (table,) = Tree(render(folder)).root.all("table", class_="comparison")
    titles = [element.text for element in table.all("th", scope="col")]
    assert ("TTFT p90, s" in titles) == shown
    assert "Open loop TTFT p90, s" in titles
    assert not any("p99" in title for title in titles)
    assert "Time per output token, s" in titles


def test_open_loop_has_a_table_with_limits_and_what_its_requests_support(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run", {name: [1.0] * 5 for name in ("harmoeny", "static_ep")})
    assert list(Tree(render(folder)).root.all("table", class_="serving")) == []
    write_rates(folder, {(name, rate): [0.1 * rate] * 20 for name in ("harmoeny", "static_ep") for rate in (2.0, 8.0)})
    change_config(folder, slo={"ttft_s": 0.5, "share": 0.9})
    page = render(folder)
    (table,) = Tree(page).root.all("table", class_="serving")
    assert [element.words().strip() for element in table.all("th", scope="rowgroup")] == ["rate/s 2", "rate/s 8"]
    rows = [[cell.text for cell in row.all("td")] for row in table.all("tr") if "data-system" in row.attributes]
    titles = [" ".join(element.text.split()) for element in table.all("th", scope="col")][1:]
    shares, p90 = (titles.index(name) for name in ("good", "TTFT p90 ms"))
    assert [row[shares] for row in rows] == ["100.0%", "100.0%", "0.0%", "0.0%"]
    assert [row[p90] for row in rows] == ["200", "200", "800", "800"]
    assert "p99 368. There are 40." in page
    assert "HarMoEny 2/s; Static EP 2/s" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (9.999, "10.0"), (123.4, "123"), (12345.6, "12,346"), (2e-5, "0.0000200")],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


class TestFolders:
    """What a folder of results becomes."""

    def headings(self, path: Path) -> list[str]:
        return [heading.text for heading in Tree(path.read_text(encoding="utf-8")).root.all("h2")]

    def notes(self, root: Element) -> list[tuple[str, list[str]]]:
        found = next(root.all("header")).all("details")
        return [(next(note.all("summary")).text, [code.text for code in note.all("code")]) for note in found]

    def test_several_sweeps_and_single_runs_have_a_section_each(self, tmp_path: Path) -> None:
        results = tmp_path / "skew_sweep"
        write_sweep(results, [0.0, 0.5])
        for skew in (0.0, 0.5):
            change_manifest(results / f"skew={skew}", ended_at="2026-01-01T00:00:00+00:00")
        good_run(results / "later", ended_at="2026-01-03T00:00:00+00:00")
        good_run(results / "latest", ended_at="2026-01-04T00:00:00+00:00")
        change_config(results / "latest", tag="second try")
        write_run(results / "lost")
        change_manifest(results / "lost", status="failed")
        target = write_report(results)
        assert target == results / "report.html"
        assert self.headings(target) == ["skew_sweep", "skew_sweep (second try)", "skew_sweep"]
        root = Tree(target.read_text(encoding="utf-8")).root
        (contents,) = [nav for nav in root.all("nav") if nav.attributes["aria-label"] == "Contents"]
        targets = [str(a.attributes["href"])[1:] for a in contents.all("a")]
        assert targets == [section.attributes["id"] for section in root.all("section")]
        assert [a.text for a in contents.all("a")] == [
            "skew_sweep: 2026-01-01, switch, 2 ranks, gloo on CPU of tests",
            "skew_sweep (second try): 2026-01-04, switch, 2 ranks, gloo on CPU of tests",
            "skew_sweep: 2026-01-03, switch, 2 ranks, gloo on CPU of tests",
        ]
        assert self.notes(root) == [("Runs that did not come to an end, hence not shown: 1", ["lost"])]

    def test_sweep_of_which_a_run_failed_says_why(self, tmp_path: Path) -> None:
        folder = write_sweep(tmp_path, [0.0, 0.5])
        change_manifest(tmp_path / "skew=0.5", status="failed", error="rank 1 was lost")
        page = write_report(folder, tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
        assert "skew=0.5 (failed: rank 1 was lost)" in page

    def test_old_run_does_not_hide_the_others_and_is_named(self, tmp_path: Path) -> None:
        good_run(tmp_path / "new")
        old = good_run(tmp_path / "old") / "layers.parquet"
        pd.read_parquet(old).drop(columns="padded_tokens").to_parquet(old, index=False)
        root = Tree(write_report(tmp_path).read_text(encoding="utf-8")).root
        reason = f"{old}: column 'padded_tokens' is missing"
        assert self.notes(root) == [("Results that cannot be read, hence not shown: 1", [reason])]
        (tmp_path / "new" / "manifest.json").unlink()
        for folder in (tmp_path / "old", tmp_path):
            with pytest.raises(ValueError, match="padded_tokens"):
                write_report(folder)

    def test_folder_without_results_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no finished run; python run"):
            write_report(tmp_path)
        with pytest.raises(ValueError, match="must be a folder of results"):
            write_report(tmp_path / "nowhere")


def test_numbers_are_json(page: str, root: Element) -> None:
    def refuse(text: str) -> Any:
        raise AssertionError(text)

    (plots,) = root.all("script", id="plots")
    json.loads(plots.text, parse_constant=refuse)
