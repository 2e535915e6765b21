"""The summary in words: what was compared, on what, and what came out, computed from the runs."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.data.load import Run
from analysis.data.pairing import is_even, run_ratio
from analysis.data.stats import ENOUGH_ROUNDS, Estimate
from analysis.present.table import exchange_text, rounds_text, texts_read
from analysis.report.html.section import Section, axis_name, joined, names_of, prose, span, value_text

#: Up to so many points are all told; of more, the first, the last, and those with the best and the worst ratio.
_ALL_POINTS = 6
_STATIC = "static_ep"
_NO_SKEW = "throughput_ratio_to_no_skew"
_UNCLEAR = "no clear difference"
_ONE_ROUND = "no verdict from one round"


@dataclass(frozen=True)
class Result:
    """Our system beside the best exact baseline at one point.

    Attributes:
        point: its name; empty for a single run.
        ours: our system.
        baseline: the best exact baseline.
        verdict: faster, slower, or no clear difference; none from one round.
        throughput: ratio of throughputs, paired by round.
        ttft: ratio of times to first token, paired by round.
        idle: share of the MoE layers' time that our ranks idled.
        baseline_idle: likewise of the baseline.
        static: ratio to static EP's throughput, where that is there and not the best.
        no_skew: ratio to the throughput of the best exact system at no skew, where both were measured together.
    """

    point: str
    ours: str
    baseline: str
    verdict: str
    throughput: Estimate
    ttft: Estimate
    idle: float
    baseline_idle: float
    static: Estimate | None = None
    no_skew: Estimate | None = None

    @property
    def sentence(self) -> str:
        """Say it."""
        ratio = self.throughput
        start = f"At {self.point}, " if self.point else ""
        static = f" ({_times(self.static)} that of {prose(_STATIC)})" if self.static else ""
        kept = f" It has {_times(self.no_skew)} that of the best system at no skew." if self.no_skew else ""
        idle = f"idle share {self.idle:.0%} instead of {self.baseline_idle:.0%}"
        return (
            f"{start}{prose(self.ours)} has {_times(ratio)} the throughput of {prose(self.baseline)}, the best exact "
            f"baseline: {self.verdict}{static}.{kept} "
            f"Time to first token {_percent(self.ttft)}, {idle}."
        )


@dataclass(frozen=True)
class Headline:
    """What stands at the top of a section.

    Attributes:
        compared: what was compared.
        measured_on: backend, device, model, data.
        main: the main result, at the point with the largest value of the swept option (or the only one).
        others: results of other points.
        fallback: what is said instead where there is nothing of ours, or no baseline.
    """

    compared: str
    measured_on: str
    main: Result | None
    others: list[Result]
    fallback: str | None


def headline(section: Section) -> Headline:
    """Put a section into words."""
    found = [result for i in range(len(section.runs)) if (result := compare(section, i)) is not None]
    main, others = _choose(section, found)
    return Headline(_compared(section), measured_on(section), main, others, None if main else _fastest(section))


def own_system(section: Section, run: Run) -> str | None:
    """Return our system: HarMoEny as it is, else the first variant that the configuration names."""
    there = set(section.rows(run)["system"])
    ours = [n for n, kind in run.systems.items() if n in there and not kind["baseline"] and not kind["bound"]]
    return "harmoeny" if "harmoeny" in ours else next(iter(ours), None)


def compare(section: Section, index: int) -> Result | None:
    """Compare our system with the best exact baseline of a run; None where one of the two is missing."""
    run, values = section.runs[index], section.values[index]
    rows = section.rows(run).set_index("system")
    best = rows.index[rows["best_baseline"]]
    ours = own_system(section, run)
    if ours is None or best.empty:
        return None
    baseline = str(best[0])

    def ratio(metric: str, other: str) -> Estimate:
        return run_ratio(run, _by_round(values, ours)[metric], _by_round(values, other)[metric])

    throughput = ratio("throughput_tokens_per_s", baseline)
    has_no_skew = _NO_SKEW in rows and not pd.isna(rows[_NO_SKEW][ours]) and not is_even(run)
    has_static = baseline != _STATIC != ours and _STATIC in rows.index
    return Result(
        point=section.labels[index],
        ours=ours,
        baseline=baseline,
        verdict=_verdict(throughput, exact=bool(rows["exact"][ours])),
        throughput=throughput,
        ttft=ratio("ttft_s", baseline),
        idle=float(rows["idle_share"][ours]),
        baseline_idle=float(rows["idle_share"][baseline]),
        static=ratio("throughput_tokens_per_s", _STATIC) if has_static else None,
        no_skew=_estimate(rows, ours, _NO_SKEW) if has_no_skew else None,
    )


def _estimate(rows: pd.DataFrame, system: str, name: str) -> Estimate:
    """Return an estimate of a summary frame."""
    middle, low, high = (float(rows[f"{name}{end}"][system]) for end in ("", "_low", "_high"))
    return Estimate(middle, low, high, int(rows["num_rounds"][system]))


def measured_on(section: Section) -> str:
    """Say what made the numbers."""
    manifest, frame = section.runs[0].manifest, section.frame
    several = frame["num_rounds"].max() > 1
    ranks, devices = span(frame["world_size"]), " + ".join(sorted(frame["device"].unique()))
    models = joined(frame["model_name"])
    how = (
        "Simulated, not measured,"
        if section.simulated
        else f"Measured with {manifest['backend']}{exchange_text(frame)}"
    )
    scope = "the whole model" if manifest["scope"] == "model" else "MoE layers only"
    experts, layers, top_k = (span(frame[key]) for key in ("num_experts", "num_moe_layers", "top_k"))
    shape = f"{experts} experts in each of {layers} MoE {'layer' if layers == '1' else 'layers'}, top-{top_k}"
    texts = texts_read(frame)
    read = f"; data set {', '.join(texts)}" if texts else ""
    link = "" if section.simulated else f", host link {joined(frame['host_link'])}"
    return (
        f"{how} on {devices}{link}, {ranks} {'rank' if ranks == '1' else 'ranks'}; {scope}, {models} "
        f"({shape}){read}. "
        f"{rounds_text(frame).capitalize()}"
        f"{' with 95 % bootstrap intervals' if several else ''}"
        f"{', ratios paired by round' if several and not section.unpaired else ''}."
    )


def _compared(section: Section) -> str:
    systems = list(section.systems)
    ours = [name for name in systems if not section.systems[name]["baseline"]]
    others = [name for name in systems if name not in ours]
    what = f"{names_of(ours)} against {names_of(others)}" if ours and others else names_of(systems)
    return f"{what}{''.join(_spread(section))}."


def _spread(section: Section) -> list[str]:
    parts = []
    for i, axis in enumerate(section.axes):
        values = list(dict.fromkeys(value_text(point[axis]) for point in section.points))
        shown = ", ".join(values) if len(values) <= _ALL_POINTS else f"{values[0]} to {values[-1]}"
        parts.append(f"{', at' if not i else ' and'} {len(values)} values of {axis_name(axis)} ({shown})")
    if not parts and section.labels[0]:
        parts.append(f", at {section.labels[0]}")
    return parts


def _choose(section: Section, found: list[Result]) -> tuple[Result | None, list[Result]]:
    if not found:
        return None, []
    main = found[-1]
    if section.axes:
        values = {name: point[section.axes[0]] for name, point in zip(section.labels, section.points, strict=True)}
        if all(isinstance(value, int | float) for value in values.values()):
            main = max(found, key=lambda result: values[result.point])
    others = [result for result in found if result is not main]
    if len(others) > _ALL_POINTS:
        by_ratio = sorted(others, key=lambda result: result.throughput.median)
        kept = {id(result) for result in (others[0], others[-1], by_ratio[0], by_ratio[-1])}
        others = [result for result in others if id(result) in kept]
    return main, others


def _fastest(section: Section) -> str:
    rows = section.frame[section.frame["exact"] & ~section.frame["bound"]]
    if rows.empty:
        return "No exact system is among them."
    sentences = []
    for run, name in zip(section.runs, section.labels, strict=True):
        of_run = rows[rows["run_id"] == run.manifest["run_id"]]
        if not of_run.empty:
            row = of_run.loc[of_run["throughput_tokens_per_s"].idxmax()]
            at = f" at {name}" if name else ""
            sentences.append(f"{prose(row['system'])}{at} ({row['throughput_tokens_per_s']:,.0f} tokens/s)")
    return f"There is no pair of our system and an exact baseline to compare. Fastest exact: {'; '.join(sentences)}."


def _verdict(ratio: Estimate, *, exact: bool) -> str:
    if ratio.n == 1:
        return _ONE_ROUND
    if ratio.low > 1:
        verdict = "faster"
    elif ratio.high < 1:
        verdict = "slower"
    else:
        verdict = _UNCLEAR
    if verdict != _UNCLEAR and ratio.n < ENOUGH_ROUNDS:
        verdict = f"{verdict} in these {ratio.n} rounds"
    return verdict if exact else f"{verdict}, but it drops tokens"


def _times(ratio: Estimate) -> str:
    interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.n > 1 else ""
    return f"{ratio.median:.2f}{interval} times"


def _percent(ratio: Estimate) -> str:
    low, middle, high = ((value - 1) * 100 for value in (ratio.low, ratio.median, ratio.high))
    interval = f" [{low:+.0f}, {high:+.0f}]" if ratio.n > 1 else ""
    return f"{middle:+.0f} %{interval}"


def _by_round(values: pd.DataFrame, system: str) -> pd.DataFrame:
    return values[values["system"] == system].set_index("round").sort_index()
