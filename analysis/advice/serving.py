"""The page of advice where requests come on their own: which system keeps the limits up to the highest rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl

from analysis.advice.document import Document, Part, Picture, Table
from analysis.advice.getting import getting
from analysis.advice.margin import Margin
from analysis.advice.parts import WHAT_IF_TEXTS
from analysis.advice.points import AS_RECORDED, cases_of
from analysis.advice.rates import Rated, RateVerdict, rate_verdict
from analysis.advice.texts import NOTHING, badges, kind_of, model_text, origin, provenance, settled
from analysis.data.load import Run, Sweep
from analysis.data.serving import limits_of, open_loop, share_of
from analysis.figures import serving_rates
from analysis.figures.kit.base import figure_data
from analysis.present.layout import save_figure
from analysis.present.serving_table import share_note
from analysis.present.style import RC, label

_LIMITS = {"ttft_s": "TTFT", "tpot_s": "time per output token", "e2e_s": "whole request"}
_FIGURE = "advice_rates"


def has_rates(run: Run) -> bool:
    """Tell whether a run served requests that came on their own, under limits."""
    return bool(limits_of(run)) and not open_loop(run).empty


@dataclass(frozen=True)
class Served:
    """What a sweep found whose runs all served requests.

    Attributes:
        runs: the one as recorded first.
        verdicts: theirs.
        margin: by what times may be off.
        num_missing: points that are not finished.
    """

    runs: Sequence[Run]
    verdicts: Sequence[RateVerdict]
    margin: Margin
    num_missing: int = 0

    @classmethod
    def of(cls, sweep: Sweep, margin: Margin) -> Served:
        """Judge all runs of a sweep.

        Raises:
            ValueError: no point is as recorded, or static expert parallelism is missing.
        """
        pairs = sorted(zip(cases_of(sweep), sweep.runs, strict=True), key=lambda pair: pair[0] != AS_RECORDED)
        verdicts = [rate_verdict(run, case, margin.relative) for case, run in pairs]
        return cls([run for _, run in pairs], verdicts, margin, len(sweep.missing))


def serving_document(served: Served, folder: Path) -> Document:
    """Return the page.

    Args:
        served: of a sweep.
        folder: whose ``figures`` its picture goes to.
    """
    run, first = served.runs[0], served.verdicts[0]
    advised = [one.system for one in [first.best, *first.equals] if one is not None]
    return Document(
        title=f"Which system serves {model_text(run)} on {run.manifest['world_size']} ranks of "
        f"{run.manifest['device']}?",
        badges=[*badges(run), limits_text(run)],
        lead=[lead_of(run, first)],
        bullets=_remarks(served),
        parts=[_rates(served, folder), *getting(run, advised), _cases(served), _sureness(served)],
    )


def limits_text(run: Run) -> str:
    """Write the limits of a run."""
    limits = ", ".join(f"{_LIMITS[name]} up to {limit * 1e3:,.0f} ms" for name, limit in limits_of(run).items())
    return f"{limits}, for {share_of(run):.0%} of the requests"


def lead_of(run: Run, one: RateVerdict) -> str:
    """Say what to do.

    Args:
        run: as recorded.
        one: its verdict.
    """
    static, limits = one.static, limits_text(run)
    if one.best is not None:
        than = f"up to {static.rate:.3g}" if static.rate else f"not even at {one.rates[0]:.3g}, the lowest that was run"
        more = " or more" if one.best.next_rate is None else ""
        return (
            f"Use {label(one.best.system)}: it keeps the limits ({limits}) up to {one.best.rate:.3g} requests per "
            f"second{more}, static EP {than}."
        )
    if not any(other.rate for other in [static, *one.others]):
        return (
            f"No system keeps the limits ({limits}) at {one.rates[0]:.3g} requests per second or more: ask for a lower "
            "rate (requests.rate_per_s=), looser limits (slo.*), or more ranks (world_size=)."
        )
    if static.next_rate is None:
        return (
            f"{NOTHING.capitalize()}: static EP keeps the limits ({limits}) at all rates that were run, up to "
            f"{static.rate:.3g} requests per second (requests.max_rates= runs more)."
        )
    return (
        f"{NOTHING.capitalize()}: static EP keeps the limits ({limits}) up to {static.rate:.3g} requests per second, "
        "and no other system certainly keeps them at a higher rate."
    )


def _remarks(served: Served) -> list[str]:
    """Return what else to know first."""
    equals, margin = served.verdicts[0].equals, served.margin
    remarks = []
    if equals:
        remarks.append(f"As good, for all that can be told: {', '.join(label(one.system) for one in equals)}.")
    remarks.append(
        "A system counts as better where it would keep the limits at a higher rate than static EP even if all that it "
        f"does took {1 + margin.relative:.2f} times as long: {margin.reason}."
    )
    if served.num_missing:
        remarks.append(f"Not in here: {served.num_missing} points of the sweep that are not finished.")
    return remarks


def _rates(served: Served, folder: Path) -> Part:
    """Say up to which rate every system keeps the limits, and what fails beyond."""
    run, one = served.runs[0], served.verdicts[0]
    rows = [_row(other) for other in sorted([one.static, *one.others], key=lambda other: -other.rate)]
    strong = {(r, c) for r, row in enumerate(rows) for c in (0, 1) if one.best and row[0] == label(one.best.system)}
    requests = run.config["requests"]
    return Part(
        "Up to which rate",
        text=[
            f"Requests of {run.config['seq_len']:,} tokens that get {requests['output_tokens']} each, up to "
            f"{run.config['batch_size']} at a time per rank; rates are over all ranks, and every system gets the same "
            f"requests at the same times. Certain: the rate if all took longer by {served.margin.name}."
        ],
        table=Table(
            ["system", "keeps limits up to", "certain", "at the next rate", "too late there"],
            rows,
            frozenset(strong),
        ),
        picture=Picture(_draw(run, folder / "figures"), "Goodput and latencies by rate"),
        notes=[
            f"Rates that were run, in requests/s: {', '.join(f'{rate:.3g}' for rate in one.rates)}; a system is run up "
            "to the first at which too few of its requests are good.",
            *settled(run),
            "How requests are scheduled: docs/metrics.md.",
        ],
    )


def _row(one: Rated) -> list[str]:
    late = "; ".join(f"{_LIMITS[name]}: {share:.0%}" for name, share in one.failing.items() if share)
    return [
        label(one.system),
        f"{one.rate:.3g}" if one.rate else "no rate",
        f"{one.certain:.3g}" if one.certain else "no rate",
        "not run" if one.next_rate is None else f"{one.next_rate:.3g}",
        late,
    ]


def _draw(run: Run, folder: Path) -> Path:
    data = figure_data([run], [{}])
    with mpl.rc_context(cast(Any, RC)):
        return save_figure(serving_rates.plot(data), folder, _FIGURE)


def _cases(served: Served) -> Part:
    """Say what changes the advice."""
    rows: list[list[str]] = []
    strong, changing = set(), []
    for one in served.verdicts:
        name = WHAT_IF_TEXTS.get(one.what_if, one.what_if.replace("_", " "))
        if served.verdicts[0].differs(one):
            strong.add((len(rows), 1))
            changing.append(name)
        best = NOTHING if one.best is None else f"{label(one.best.system)}, up to {one.best.rate:.3g}"
        static = f"up to {one.static.rate:.3g}" if one.static.rate else "no rate"
        others = [other for other in one.others if other is not one.best][:3]
        rows.append([name, best, static, "; ".join(f"{label(other.system)} {other.rate:.3g}" for other in others)])
    text = f"The advice changes with: {', '.join(changing)}." if changing else "None of them changes the advice."
    return Part(
        "What the answer depends on",
        text=[f"One thing at a time is taken to be different. {text}"],
        table=Table(["with", "use", "static EP keeps limits", "next"], rows, frozenset(strong)),
    )


def _sureness(served: Served) -> Part:
    run, margin = served.runs[0], served.margin
    number, rounds = run.config["requests"]["per_round"], run.config["rounds"]
    return Part(
        "How sure this is",
        bullets=[
            *provenance(run),
            *margin.details,
            f"Every rate has {number} requests in each of {rounds} rounds: at a rate next to the limit, other requests "
            "may fall to the other side."
            + (f" {note}" if (note := share_note(number * rounds, share_of(run))) else ""),
            "Every round has the popularity of one recorded batch, and its further tokens that of their prompts.",
            f"All numbers are {kind_of(run)} with one schedule: prompts first, no chunks of prompts, no prefix cache "
            "(docs/serving.md). Compare systems, not seconds.",
        ],
        notes=[origin(run)],
    )
