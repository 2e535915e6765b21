"""What a reader has to know before believing a section's numbers. docs/report.md lists the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from analysis.data.load import Run
from analysis.data.pairing import MANY_MOVED, moved_rounds
from analysis.data.stats import ENOUGH_ROUNDS
from analysis.data.twins import twins_of
from analysis.present.table import error_bar, missed_goals
from analysis.report.html.section import Section, names_of, prose
from results_schema.yardstick import MOVED

#: An interval of the throughput that reaches further than this share of the median from it is wide.
WIDE_INTERVAL = 0.1
#: A first round slower than the others' median by this share, in most systems, was still warming up.
SLOW_START = 0.2
#: A second half of the rounds that is slower or faster than the first by this share, in most systems, is a drift.
DRIFT = 0.15
_LISTED = 6


@dataclass(frozen=True)
class Alert:
    """A warning.

    Attributes:
        level: ``error``: do not use the numbers; ``warning``: mind this; ``note``: what they are.
        title: in a few words.
        text: what it means, with the runs, systems or values concerned.
    """

    level: Literal["error", "warning", "note"]
    title: str
    text: str


def warnings_of(section: Section) -> list[Alert]:
    """Return a section's warnings, the gravest first."""
    found = [warning for rule in _RULES for warning in rule(section)]
    return sorted(found, key=lambda warning: ("error", "warning", "note").index(warning.level))


def _failed_checks(section: Section) -> Iterator[Alert]:
    checks = [(name, run, run.manifest.get("checks")) for name, run in _named(section)]
    failed = [
        f"{prose(system)}{_at(name)} ({check.get('reason') or _error(check)})"
        for name, _, of_run in checks
        for system, check in (of_run or {}).items()
        if not check.get("passed", False)
    ]
    failed += [
        f"{prose(system)}{_at(name)} ({reason})"
        for name, run, of_run in checks
        for system, reason in (run.manifest.get("failed_systems") or {}).items()
        if system not in (of_run or {})
    ]
    if failed:
        text = "These systems do not compute what they should, so there are no timings of them to believe"
        yield Alert("error", "Failed checks", f"{text}: {_some(failed, '; ')}.")
    unchecked = [str(run.manifest["run_id"]) for _, run, of_run in checks if not of_run]
    if unchecked and not section.simulated:
        yield Alert("warning", "Outputs not checked", f"No comparison with the dense model: {_some(unchecked)}.")


def _error(check: dict[str, Any]) -> str:
    return f"error {check.get('relative_error', float('nan')):.1e}, allowed {check.get('tolerance', float('nan')):.0e}"


def _simulated(section: Section) -> Iterator[Alert]:
    if not section.simulated:
        return
    sources = _distinct(
        f"{run.manifest['device']} ({run.manifest.get('hardware_source') or 'no source given'})" for run in section.runs
    )
    yield Alert(
        "note",
        "Simulated, not measured",
        f"The simulator planned with the real policies and predicted every time; hardware: {'; '.join(sources)}. "
        "docs/simulator.md says what is modelled and how wrong it is. Intervals show how the inputs vary and say "
        "nothing of the model's error.",
    )


def _emulated(section: Section) -> Iterator[Alert]:
    if "emulated" in set(section.frame["host_link"]):
        rates = _distinct(
            f"{rate / 1e9:g} GB/s"
            for run in section.runs
            if (rate := (run.config.get("hardware") or {}).get("host_link_bytes_per_s"))
        )
        yield Alert(
            "note",
            "Emulated host link",
            "Fetches from host memory take as long as a configured link would take"
            f"{f' ({_some(rates)})' if rates else ''}; nothing travels over such a link.",
        )


def _out_of_memory(section: Section) -> Iterator[Alert]:
    lacking = [
        f"{prose(system)}{_at(name)}: {reason}"
        for name, run in _named(section)
        for system, reason in (run.manifest.get("out_of_memory") or {}).items()
    ]
    if lacking:
        yield Alert("warning", "Out of memory", f"Without result, because they do not fit: {_some(lacking, '; ')}.")


def _unpaired(section: Section) -> Iterator[Alert]:
    if section.unpaired:
        yield Alert("warning", "Unpaired systems", section.unpaired)


def _missing(section: Section) -> Iterator[Alert]:
    if section.missing:
        yield Alert(
            "warning",
            "Unfinished sweep",
            f"{len(section.missing)} of its runs {'is' if len(section.missing) == 1 else 'are'} not finished "
            f"({_some(section.missing, '; ')}). Start the same command again to get what is missing.",
        )


def _mixed(section: Section) -> Iterator[Alert]:
    if section.apart:
        yield Alert("warning", "Several kinds of runs", section.apart)
    for what, values in (
        ("devices", _distinct(section.frame["device"])),
        ("host links", _distinct(section.frame["host_link"])),
        ("revisions of the code", _noted(section, "git", "revision")),
        ("versions of PyTorch", _noted(section, "packages", "torch")),
        ("hosts", _noted(section, "host", "name")),
    ):
        if len(values) > 1:
            text = "Compare systems within a point; points differ in more than the swept option"
            yield Alert("warning", f"Several {what}", f"{text}: {_some(values)}.")


def _few_rounds(section: Section) -> Iterator[Alert]:
    fewest = min(run.iterations["round"].nunique() for run in section.runs)
    if fewest < ENOUGH_ROUNDS and not section.simulated:
        meaning = "one sample has no interval" if fewest == 1 else "the intervals are the range of the samples at best"
        yield Alert(
            "warning",
            "Too few rounds",
            f"{fewest} measured {'round' if fewest == 1 else 'rounds'}, where {ENOUGH_ROUNDS} or more are needed for "
            f"an interval that can be relied on: {meaning}. Set rounds= higher.",
        )


def _wide_intervals(section: Section) -> Iterator[Alert]:
    if section.simulated:
        return
    middle, low, high = (section.frame[f"throughput_tokens_per_s{end}"] for end in ("", "_low", "_high"))
    reach = pd.concat([high - middle, middle - low], axis=1).max(axis=1) / middle
    wide = reach[reach > WIDE_INTERVAL].sort_values(ascending=False)
    if wide.empty:
        return
    names = dict(zip((run.manifest["run_id"] for run in section.runs), section.labels, strict=True))
    worst = [
        f"{prose(row['system'])}{_at(names[row['run_id']])} (up to {share:.0%})"
        for share, (_, row) in zip(wide, section.frame.loc[wide.index].iterrows(), strict=True)
    ]
    yield Alert(
        "warning",
        "Noise: wide intervals",
        f"The throughput's interval reaches more than {WIDE_INTERVAL:.0%} from the median for {len(wide)} of "
        f"{len(section.frame)}: {_some(worst)}. Ratios paired by round suffer less from a noisy machine than medians.",
    )


def _warm_up(section: Section) -> Iterator[Alert]:
    if section.simulated:
        return
    if any(run.config.get("warmup_rounds") == 0 for run in section.runs):
        yield Alert("warning", "No warm-up", "No round was thrown away before measuring (warmup_rounds=0).")
    slow, drifting = [], []
    for (name, run), values in zip(_named(section), section.values, strict=True):
        latency = values.pivot_table(index="round", columns="system", values="latency_s").sort_index()
        if len(latency) < ENOUGH_ROUNDS or run.manifest["point"].get("router") == "dynamic":
            continue  # too little to tell, or rounds that differ on purpose
        start = latency.iloc[0] / latency.iloc[1:].median() - 1
        if (start > SLOW_START).mean() > 0.5:
            slow.append(f"{name or 'this run'} (by {start.median():.0%})")
        half = len(latency) // 2
        change = latency.iloc[-half:].median() / latency.iloc[:half].median() - 1
        if (change > DRIFT).mean() > 0.5 or (change < -DRIFT).mean() > 0.5:
            drifting.append(f"{name or 'this run'} ({change.median():+.0%})")
    if slow:
        text = "The first measured round was slower than the others for most systems"
        yield Alert("warning", "Warm-up too short", f"{text}: {_some(slow)}. Set warmup_rounds= higher.")
    if drifting:
        text = "For most systems the second half of the rounds took longer or shorter than the first"
        cause = "another load on the machine, or heat; ratios paired by round hold, medians less so"
        yield Alert("warning", "Drift while measuring", f"{text}: {_some(drifting)}. Likely causes: {cause}.")


def _moved(section: Section) -> Iterator[Alert]:
    moved = {name: moved_rounds(run) for name, run in _named(section)}
    shares = {name: len(moved[name]) / run.iterations["round"].nunique() for name, run in _named(section)}
    if not any(shares.values()):
        return
    told = [f"{name or 'this run'} ({_some([str(i) for i in rounds])})" for name, rounds in moved.items() if rounds]
    yield Alert(
        "warning" if max(shares.values()) > MANY_MOVED else "note",
        "The machine moved",
        f"Its yardstick took over {MOVED:.0%} longer at one end of a round than at the other: rounds of "
        f"{_some(told, '; ')}. They are kept, and the intervals of ratios are longer by them (docs/metrics.md).",
    )


def _goal(section: Section) -> Iterator[Alert]:
    for text in missed_goals(section.runs):
        yield Alert("warning", "Wider than asked for", text)


def _error_bar(section: Section) -> Iterator[Alert]:
    for twins in twins_of(section.runs):
        differ = not all(ratio.low <= 1 <= ratio.high for ratio in twins.ratios)
        text = error_bar(twins).removeprefix("Error bar: ")
        more = " Do not believe differences as small as this one." if differ else ""
        yield Alert("warning" if differ else "note", "The sweep's own error bar", f"{text}{more}")


def _crowded(section: Section) -> Iterator[Alert]:
    crowded = [
        f"{name or 'this run'} ({ranks} ranks x {threads} threads on {_cores_of(host)})"
        for name, run in _named(section)
        if (manifest := run.manifest)["backend"] == "gloo"
        and (ranks := manifest["world_size"])
        and (threads := manifest.get("threads_per_rank"))
        and (cores := (host := manifest.get("host") or {}).get("num_cores"))
        and threads * ranks > min(cores, host.get("cpu_quota") or cores)
    ]
    if crowded:
        yield Alert(
            "warning",
            "Ranks share cores",
            f"Unless the ranks ran on several hosts, they competed for the processor: {_some(crowded)}.",
        )


def _cores_of(host: Mapping[str, Any]) -> str:
    limit = host.get("cores_limited_by")
    return f"{host['num_cores']} {'core' if host['num_cores'] == 1 else 'cores'}" + (f": {limit}" if limit else "")


def _beside(section: Section) -> Iterator[Alert]:
    if section.simulated:
        return
    crowded = [
        f"{name or 'this run'} ({_some(_distinct(other.get('run') for other in others))})"
        for name, run in _named(section)
        if (others := run.manifest.get("beside"))
    ]
    if crowded:
        yield Alert(
            "warning",
            "Measured beside others",
            "Other measurements ran on the same machine at the same time and took a share of it: "
            f"{_some(crowded, '; ')}. Measure again alone (force=true).",
        )


def _code(section: Section) -> Iterator[Alert]:
    states = [run.manifest.get("git") or {} for run in section.runs]
    if any(state.get("dirty") for state in states):
        yield Alert(
            "warning",
            "Changed code",
            "Tracked files differed from the revision that the manifest names: nobody else can run the same code.",
        )
    if any(not state.get("revision") for state in states):
        yield Alert("note", "Unknown code", "The manifest names no git revision.")


def _comparison(section: Section) -> Iterator[Alert]:
    dropping = [name for name, kind in section.systems.items() if not kind["exact"]]
    if dropping:
        text = "not the model's output, so never the baseline. Their throughput counts tokens that nobody computed"
        yield Alert("note", "Systems that drop tokens", f"{names_of(dropping)}: {text}.")
    if not section.frame["best_baseline"].any():
        yield Alert("note", "No baseline", "There is no exact baseline among the systems, hence no ratio.")
    if section.runs[0].manifest["scope"] == "layer":
        yield Alert("note", "MoE layers only", "Latency, TTFT and throughput are of the MoE layers, not of a model.")


def _data(section: Section) -> Iterator[Alert]:
    shared = {part for run in section.runs for part in run.manifest["dataset"].get("shared_text") or ()}
    if "calibration" in shared:
        text = "The data set is too short: systems that learn before the measurement learned from text that is measured"
        yield Alert("warning", "Learned from measured text", f"{text}. Use a longer text, or fewer rounds.")
    if "warm-up" in shared:
        text = "The data set is too short: checks and warm-up read text that is measured, or learned from"
        yield Alert("note", "Warm-up on measured text", f"{text}. No system keeps anything of it.")
    if any(run.manifest["dataset"].get("repeats_text") for run in section.runs):
        yield Alert("note", "Text read twice", "The data set is shorter than what was needed: sequences repeat.")
    if any(run.config.get("model", {}).get("random_weights") for run in section.runs):
        yield Alert("note", "Random weights", "The model's shape without its trained weights (random_weights=true).")


_RULES: Sequence[Callable[[Section], Iterable[Alert]]] = (
    _failed_checks, _simulated, _emulated, _mixed, _unpaired, _missing, _out_of_memory, _few_rounds, _wide_intervals,
    _warm_up, _moved, _goal, _error_bar, _crowded, _beside, _code, _comparison, _data,
)  # fmt: skip


def _named(section: Section) -> list[tuple[str, Run]]:
    return list(zip(section.labels, section.runs, strict=True))


def _at(name: str) -> str:
    return f" at {name}" if name else ""


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _noted(section: Section, part: str, name: str) -> list[str]:
    return _distinct((run.manifest.get(part) or {}).get(name) for run in section.runs)


def _some(items: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(items[:_LISTED])
    return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
