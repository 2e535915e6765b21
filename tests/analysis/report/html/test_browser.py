"""The page in a real browser: nothing is fetched, nothing complains, everything is drawn, and the legend works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from analysis.present.style import label, look
from analysis.report.html.write import write_report
from tests.analysis.report.html.browser import need_chromium
from tests.synthetic import LATENCY_S, write_sweep

#: Chromium may have to be installed first, after what other tests install.
pytestmark = [pytest.mark.programs, pytest.mark.timeout(400)]

PLOTS = 6
#: Systems that are drawn as bars, with two skews each.
BARS = len(LATENCY_S) - 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = need_chromium()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_sweep(tmp_path_factory.mktemp("results"), [0.0, 0.9]))


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What the browser complained of, and what it asked the network for."""
    return []


@pytest.fixture(scope="module", params=[390, 1400], ids=["narrow", "wide"])
def page(browser: Browser, report: Path, complaints: list[str], request: pytest.FixtureRequest) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    page = context.new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("request", lambda asked: complaints.append(asked.url) if asked.url != report.as_uri() else None)
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=30_000)
    yield page
    context.close()


def drawn(page: Page, plot: int) -> Locator:
    return page.locator(".js-plotly-plot").nth(plot).locator("g.barlayer g.point path")


def bars(page: Page, plot: int) -> int:
    return drawn(page, plot).count()


def entry(page: Page, plot: int, system: str) -> Locator:
    legend = page.locator(".js-plotly-plot").nth(plot).locator("g.legend g.traces")
    return legend.filter(has=page.locator("text.legendtext", has_text=label(system))).locator("rect.legendtoggle")


def test_page_is_drawn_and_complete_and_asks_for_nothing(page: Page, complaints: list[str]) -> None:
    assert page.locator(".js-plotly-plot").count() == PLOTS
    for i in range(4):
        assert bars(page, i) == 2 * BARS
    assert page.locator(".js-plotly-plot").nth(4).locator("g.scatterlayer g.trace").count() == len(LATENCY_S)
    assert bars(page, 5) >= 2 * len(LATENCY_S)
    scroll, window = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= window
    for plot in page.locator(".js-plotly-plot").all():
        outer, legend = plot.bounding_box(), plot.locator("g.legend").bounding_box()
        assert outer is not None
        assert legend is not None
        assert outer["x"] >= 0
        assert outer["x"] + outer["width"] <= window
        assert legend["y"] + legend["height"] <= outer["y"] + outer["height"] + 1, "the legend is all to be seen"
    assert complaints == []


def test_system_is_hidden_by_its_legend_in_all_plots(page: Page, complaints: list[str]) -> None:
    breakdown = bars(page, 5)
    entry(page, 0, "static_ep").click()
    one = drawn(page, 0)
    one.nth(2 * (BARS - 1)).wait_for(state="detached")
    for i in range(4):
        assert bars(page, i) == 2 * (BARS - 1)
    fills = one.evaluate_all("paths => paths.map(path => getComputedStyle(path).fill)")
    r, g, b = (int(look("static_ep").colour[i : i + 2], 16) for i in (1, 3, 5))
    assert f"rgb({r}, {g}, {b})" not in fills
    r, g, b = (int(look("harmoeny").colour[i : i + 2], 16) for i in (1, 3, 5))
    assert fills.count(f"rgb({r}, {g}, {b})") == 2
    assert page.locator(".js-plotly-plot").nth(4).locator("g.scatterlayer g.trace").count() == len(LATENCY_S) - 1
    assert bars(page, 5) == breakdown * (len(LATENCY_S) - 1) / len(LATENCY_S)
    entry(page, 1, "static_ep").click()
    one.nth(2 * BARS - 1).wait_for(state="attached")
    assert bars(page, 5) == breakdown
    assert complaints == []


def test_double_click_shows_a_system_alone_and_then_all_again(page: Page, complaints: list[str]) -> None:
    breakdown = bars(page, 5)
    for wanted in (1 / len(LATENCY_S), 1.0):
        entry(page, 0, "harmoeny").dblclick()
        expect(drawn(page, 5)).to_have_count(round(breakdown * wanted))
        expect(drawn(page, 0)).to_have_count(2 * BARS if wanted == 1 else 2)
    assert complaints == []


def test_choice_of_the_point_and_theme_redraw(browser: Browser, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="dark")
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=30_000)
    rounds = page.locator(".js-plotly-plot").nth(4)
    ticks = rounds.locator("g.ytick text").all_text_contents
    before = ticks()
    page.locator("select[data-plot=rounds]").select_option("router skew 0")  # 1.9 times the throughput
    assert ticks() != before
    expect(rounds.locator("g.ytick text").first).to_have_css("fill", "rgb(228, 231, 234)")
    page.emulate_media(color_scheme="light")
    expect(rounds.locator("g.ytick text").first).to_have_css("fill", "rgb(29, 34, 40)")
    context.close()
