"""The final table: one row per point and system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.data.load import Run
from analysis.data.pairing import measured_apart, moved_rounds, ratios_to_no_skew
from analysis.data.twins import Twins, twins_of
from analysis.present.style import KNOWLEDGE, label, marked
from results_schema.manifest import SIMULATOR
from results_schema.yardstick import MOVED

#: Columns of a table in a file, or where nobody watches.
TEXT_WIDTH = 120
#: What a summary says of how its numbers came about.
_CONDITIONS = ("run_id", "backend", "device", "host_link", "exchange", "scope", "world_size")
#: A batch that much less balanced than the median one is told beside it.
_BURST = 1.05
#: Times to first token below this, in seconds, are shown in milliseconds.
_SHORT_S = 0.1
_RATIO = "Ratio: throughput to that of the best baseline (=), paired by round [95 % interval]."
_TO_NO_SKEW = (
    "To best at no skew: likewise, to that of the best exact system where routing is even (=); only what was measured "
    "together, or simulated alike."
)
_BEST_BASELINE, _NO_SKEW = "throughput_ratio_to_best_baseline", "throughput_ratio_to_no_skew"


def summary_frame(
    runs: Sequence[Run], summaries: Sequence[dict[str, Any]], points: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """Flatten summaries: one row per run and system.

    An estimate ``x`` becomes ``x``, ``x_low`` and ``x_high``, and where it has them ``x_mean``, ``x_p90``, ``x_max``.
    Where runs were measured together with one without skew, ``throughput_ratio_to_no_skew`` stands beside them, and
    ``best_at_no_skew`` marks the system that it is to.

    Args:
        runs: the runs.
        summaries: theirs, in the same order.
        points: their values of the options that tell them apart, which become columns.
    """
    rows = []
    to_no_skew = {
        (run.manifest["run_id"], system): (ratio, is_best) for run, system, ratio, is_best in ratios_to_no_skew(runs)
    }
    for run, summary, point in zip(runs, summaries, points, strict=True):
        for system, entry in summary["systems"].items():
            row: dict[str, Any] = {**point, "system": system}
            for name, value in entry.items():
                if isinstance(value, dict):
                    row |= {name: value["median"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
                    row |= {f"{name}_{part}": value[part] for part in ("mean", "p90", "max") if part in value}
                else:
                    row[name] = value
            row["num_rounds"] = entry["throughput_tokens_per_s"]["n"]
            row["best_baseline"] = system == summary["best_baseline"]
            if found := to_no_skew.get((run.manifest["run_id"], system)):
                ratio, row["best_at_no_skew"] = found
                row |= {_NO_SKEW: ratio.median, f"{_NO_SKEW}_low": ratio.low, f"{_NO_SKEW}_high": ratio.high}
            row |= {key: summary[key] for key in _CONDITIONS}
            row |= {key: run.manifest["model"][key] for key in ("num_experts", "num_moe_layers", "top_k")}
            row |= {"model_name": model_name(run), "dataset_name": dataset_name(run)}
            rows.append(row)
    return pd.DataFrame(rows)


def model_name(run: Run) -> str:
    """Return a model's name: of one that Transformers builds, that of the model and not of the adapter."""
    model = run.config.get("model", {})
    known = model.get("local_path") or model.get("hub_name") or run.manifest["model"]["name"]
    return Path(known).name


def dataset_name(run: Run) -> str:
    """Return the name of the text, or what a replayed routing was recorded on; ``none``: simulated, from no text."""
    reads = not run.simulated or run.manifest["point"]["router"] in ("model", "trace")
    return str(run.manifest["dataset"]["name"]) if reads else "none"


def texts_read(frame: pd.DataFrame) -> list[str]:
    """Return the names of the texts behind the rows, where any was read (see :func:`dataset_name`)."""
    return sorted(set(frame["dataset_name"]) - {"none"})


def unpaired_systems(frame: pd.DataFrame) -> list[str]:
    """Return the systems that were measured under the same conditions, but not in the same run; empty: there are none.

    Args:
        frame: of :func:`summary_frame`; its columns with a dot are the options that tell points apart.
    """
    conditions = ["backend", "device", "scope", "world_size", "model_name", "dataset_name"]
    same = [*(c for c in map(str, frame.columns) if "." in c), *conditions]
    found: dict[str, None] = {}
    for _, rows in frame.groupby([frame[name].map(str) for name in same]):
        by_run = [frozenset(of_run) for _, of_run in rows.groupby("run_id")["system"]]
        # A run that merely lacks a system of another is one in which that did not fit in memory.
        if any(a - b and b - a for a in by_run for b in by_run):
            found |= dict.fromkeys(rows["system"])
    return list(found)


def unpaired_remark(frame: pd.DataFrame) -> str:
    """Say that systems were not paired, and how they would be; empty where all were."""
    names = unpaired_systems(frame)
    return (
        f"{', '.join(names)} ran in jobs of their own, one after another: their numbers are not paired. One list in "
        f"brackets compares them round by round: 'system=[{','.join(names)}]'."
        if names
        else ""
    )


def skew_points(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what tells runs apart that no sweep describes: the skew, where all their routers have one."""
    if all("skew" in run.config["router"] for run in runs):
        return [{"router.skew": run.config["router"]["skew"]} for run in runs]
    return [{} for _ in runs]


def caption(frame: pd.DataFrame) -> str:
    """Say what the numbers were measured on; results of different machines are named, never mixed silently."""
    backend, device, link, scope = (
        " + ".join(sorted(frame[key].unique())) for key in ("backend", "device", "host_link", "scope")
    )
    exchange = exchange_text(frame)
    sizes = sorted(frame["world_size"].unique())
    ranks = " + ".join(map(str, sizes)) if len(sizes) <= 3 else f"{sizes[0]} to {sizes[-1]}"
    number = f"{ranks} {'rank' if ranks == '1' else 'ranks'}"
    return f"{backend}{exchange}, {device}, host link {link}; {number}; scope {scope}; {rounds_text(frame)}"


def exchange_text(frame: pd.DataFrame) -> str:
    """Say how tokens travelled, after the backend's name; empty where that was by its collectives, as it long was."""
    used = sorted(frame["exchange"].unique())
    return "" if used == ["collective"] else f" ({' + '.join(used)})"


def rounds_text(frame: pd.DataFrame) -> str:
    """Say what the numbers are medians of: ``medians of 5 rounds``, ``one round``."""
    fewest, most = frame["num_rounds"].min(), frame["num_rounds"].max()
    if most == 1:
        return "one round"
    return f"medians of {fewest if fewest == most else f'{fewest} to {most}'} rounds"


def figure_caption(frame: pd.DataFrame) -> str:
    """Say what a figure's numbers were measured on, and which models read which text."""
    models = {
        f"{row['model_name']} ({row['num_experts']} experts x {row['num_moe_layers']} MoE layers, top-{row['top_k']})"
        for row in frame.to_dict("records")
    }
    texts = texts_read(frame)
    read = f"; data set {' + '.join(texts)}" if texts else ""
    simulated = "Simulated, not measured: " if set(frame["backend"]) == {SIMULATOR} else ""
    return f"{simulated}{caption(frame)}{_intervals(frame)}. Model {' + '.join(sorted(models))}{read}.{_letters(frame)}"


def knowledge_legend(frame: pd.DataFrame) -> str:
    """Say what the letters behind systems' names mean; empty where there are none."""
    known = {name for knows in frame.get("knows", pd.Series(dtype=object)).dropna() for name in knows.split(", ")}
    return "; ".join(text for name, (_, text) in KNOWLEDGE.items() if name in known)


def without_medians(text: str, frame: pd.DataFrame) -> str:
    """Return the caption of a figure that draws neither medians over rounds nor whiskers."""
    return text.replace(f"; {rounds_text(frame)}{_intervals(frame)}", "")


def without_whiskers(text: str, frame: pd.DataFrame) -> str:
    """Return the caption of a figure that draws medians alone."""
    return text.replace(_intervals(frame), "")


def without_letters(text: str, frame: pd.DataFrame) -> str:
    """Return the caption of a figure whose names of systems have no letters behind them."""
    return text.replace(_letters(frame), "")


def _letters(frame: pd.DataFrame) -> str:
    return f" {legend}." if (legend := knowledge_legend(frame)) else ""


def _intervals(frame: pd.DataFrame) -> str:
    return ", whiskers: 95 % bootstrap intervals" if frame["num_rounds"].max() > 1 else ""


def failed_notes(runs: Sequence[Run], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the systems that failed their check, which have no row, with the point and the reason."""
    return [
        f"{label(system)} failed its check{_at(point)}: {reason}"
        for run, point in zip(runs, points, strict=True)
        for system, reason in (run.manifest.get("failed_systems") or {}).items()
    ]


def noise_notes(runs: Sequence[Run], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far apart equal systems came out, in which rounds the machine moved, and what is no pair or too wide."""
    notes = [*(error_bar(twins) for twins in twins_of(runs)), *missed_goals(runs)]
    moved = [
        f"{len(found)} of {run.iterations['round'].nunique()}{_at(point)}"
        for run, point in zip(runs, points, strict=True)
        if (found := moved_rounds(run))
    ]
    if apart := [_at(points[index]).removeprefix(" at ") for index in measured_apart(runs)]:
        notes.append(
            f"Measured apart from no skew, so not compared with it: {', '.join(apart)} (force=true measures all)."
        )
    if moved:
        rounds = ", ".join(moved)
        notes.append(f"The machine moved by over {MOVED:.0%} in rounds: {rounds}; intervals of ratios count that.")
    return notes


def missed_goals(runs: Sequence[Run]) -> list[str]:
    """Say of measurements that ended before their intervals were as narrow as ``until`` asked for how wide they are."""
    goals = [until for run in runs if (until := run.manifest.get("until")) and until["ended_by"] != "until"]
    texts = [
        f"until={goal['asked']:g} was not reached: intervals reach "
        f"{'nowhere, as there is no ratio' if goal['reach'] is None else format(goal['reach'], '.1%')} "
        f"after {goal['rounds']} rounds ({goal['ended_by']})."
        for goal in goals
    ]
    return list(dict.fromkeys(texts))


def error_bar(twins: Twins) -> str:
    """Say of two systems that do the same how far apart they came out."""
    medians = [ratio.median for ratio in twins.ratios]
    came = f"{min(medians):.2f}" + ("" if len(medians) == 1 else f" to {max(medians):.2f}")
    return (
        f"Error bar: {label(twins.one)} and {label(twins.other)} do the same; their ratio came out at {came}, "
        f"intervals within [{twins.low:.2f}, {twins.high:.2f}]."
    )


def _at(point: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name.rsplit('.', 1)[-1]}={value}" for name, value in point.items())
    return f" at {values}" if values else ""


def build_table(frame: pd.DataFrame, axes: Sequence[str], title: str, notes: Sequence[str] = ()) -> Table:
    """Lay a summary frame out as a table for a terminal.

    Args:
        frame: a summary frame.
        axes: its columns that tell the points apart.
        title: of the table.
        notes: stand below it, one a line.
    """
    table = Table(
        title=title,
        caption=caption(frame)
        + ("\nIn parentheses: the worst batch." if bursts(frame).any() else "")
        + "\n* drops tokens: not the model's output, never the baseline. A reference is no system.\n"
        + (f"{legend}.\n" if (legend := knowledge_legend(frame)) else "")
        + (unpaired_remark(frame) or _RATIO)
        + (f"\n{_TO_NO_SKEW}" if (across := has_no_skew(frame)) else "")
        + "".join(f"\n{escape(note)}" for note in notes),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # to fit into 80 columns
        pad_edge=False,
    )
    for axis in axes:
        table.add_column(axis.rsplit(".", 1)[-1], justify="right", no_wrap=True)
    table.add_column("system", overflow="fold")  # on narrow terminals names take several lines, and nothing is cut
    for name in ("tokens/s", f"TTFT {'ms' if (ms := _in_ms(frame)) else 's'}", "idle", "imbal.", "dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ratio to best", justify="right", overflow="fold")
    if across:
        table.add_column("to best at no skew", justify="right", overflow="fold")
    previous = None
    for row, burst in zip(frame.to_dict("records"), bursts(frame), strict=True):
        point = tuple(row[axis] for axis in axes)
        if previous is not None and point != previous:
            table.add_section()
        first = point != previous
        previous = point
        table.add_row(
            *(str(value) if first else "" for value in point),
            marked(str(row["system"]), row.get("knows")) + ("" if row["exact"] else " *"),
            f"{row['throughput_tokens_per_s']:,.0f}",
            significant(row["ttft_s"] * 1e3) if ms else f"{row['ttft_s']:.3f}",
            f"{row['idle_share']:.1%}",
            f"{row['imbalance']:.2f}" + (f" ({row['imbalance_max']:.2f})" if burst else ""),
            f"{row['dropped_share']:.1%}" if row["dropped_share"] else "",
            _ratio(row, _BEST_BASELINE, "best_baseline"),
            *([_ratio(row, _NO_SKEW, "best_at_no_skew")] if across else []),
        )
    return table


def has_no_skew(frame: pd.DataFrame) -> bool:
    """Tell whether a skewed point was measured together with one without skew, so that the two can be compared."""
    return _NO_SKEW in frame and frame.loc[frame[_NO_SKEW].notna(), "run_id"].nunique() > 1


def bursts(frame: pd.DataFrame) -> pd.Series:
    """Tell by row of a summary frame whether the worst batch is so unbalanced that the median hides it."""
    return frame["imbalance_max"] > _BURST * frame["imbalance"]


def _in_ms(frame: pd.DataFrame) -> bool:
    """Tell whether times are too short for seconds with three decimals."""
    return bool(frame["ttft_s"].min() < _SHORT_S)


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, and never an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - int(f"{rounded:e}".split("e")[1]), 0)
    return f"{rounded:,.{decimals}f}" if decimals else f"{value:,.0f}"


def _ratio(row: dict[Any, Any], name: str, is_base: str) -> str:
    """Write a ratio with its interval; empty where there is none.

    Args:
        row: of a summary frame.
        name: the ratio's column.
        is_base: the column that marks what the ratio is to.
    """
    if name not in row or pd.isna(row[name]):
        return ""
    mark = "= " if row[is_base] is True else ""
    return f"{mark}{row[name]:.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"


def as_text(table: Table) -> str:
    """Render a table as plain text of :data:`TEXT_WIDTH`."""
    buffer = StringIO()
    Console(file=buffer, width=TEXT_WIDTH, color_system=None).print(table)
    return buffer.getvalue()
