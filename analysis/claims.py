"""The claims of the paper's abstract: published, simulated and measured side by side, each with its conditions.

`python -m analysis.claims` reads results/paper_skew and results/paper_qwen (simulated) and results/skew_sweep
(measured), or the folders it is given. The next-best baseline is, at the same skew of the same run, the best system
that is neither HarMoEny nor a bound and gives the model's output; systems that drop tokens are never compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.data.load import Run, find_runs
from analysis.data.pairing import run_ratio
from analysis.data.paper_values import change_text, load_published
from analysis.data.stats import Estimate
from analysis.present.style import label
from analysis.present.table import model_name
from results_schema.atomic import write_text
from results_schema.printing import print_anything

OUR_SYSTEM = "harmoeny"
#: Skews from here on are what the abstract calls heavy load imbalance: those that it was measured at, but 0.
HEAVY = 0.5
FOLDERS = tuple(Path("results", name) for name in ("paper_skew", "paper_qwen", "skew_sweep"))
COMMANDS = {
    "simulated": "python run.py experiment=paper_skew",
    "measured": "python run.py experiment=skew_sweep",
}
OUT = Path("results/claims")
COLUMNS = (
    "claim", "origin", "skew", "change", "change_low", "change_high", "baseline", "conditions", "backend", "device",
    "num_rounds", "source", "note",
)  # fmt: skip
#: What each claim is about.
TITLES = {
    "throughput": "Throughput, against the next-best baseline",
    "ttft": "Time to first token per sequence, against the next-best baseline",
    "idle": "Idle time of the GPUs per sequence, against the baseline that idles most",
}


def claims(folders: Sequence[Path]) -> pd.DataFrame:
    """Compare the abstract's claims with the runs at hand.

    Args:
        folders: folders of runs; those with HarMoEny, a router skew of at least :data:`HEAVY` and a baseline count.

    Returns:
        Rows by claim with the columns :data:`COLUMNS`. ``origin`` is ``abstract``, ``published`` (worked out from the
        published figures), ``simulated`` or ``measured``; ``change`` is relative to the baseline, with a bootstrap 95 %
        interval over rounds where it was measured. Where there is no run for an origin, ``note`` has the command.

    Raises:
        ValueError: a finished run is damaged.
    """
    runs = {run.manifest["run_id"]: run for folder in folders if folder.is_dir() for run in find_runs(folder)}
    usable = sorted((run for run in runs.values() if _counts(run)), key=lambda run: (_conditions(run), _skew(run)))
    rows = [*_abstract(), *_published(), *(row for run in usable for row in _of_run(run))]
    for claim in TITLES:
        there = {row["origin"] for row in rows if row["claim"] == claim}
        rows += [
            {"claim": claim, "origin": origin, "note": f"not at hand: {command}"}
            for origin, command in COMMANDS.items()
            if origin not in there
        ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    order = {name: i for i, name in enumerate([*TITLES, "abstract", "published", *COMMANDS])}
    return frame.sort_values(
        ["claim", "origin"], key=lambda names: names.map(order), kind="stable", ignore_index=True
    )  # fmt: skip


def _abstract() -> Iterator[dict[str, Any]]:
    for row in load_published("claims").to_dict("records"):
        yield {
            "claim": row["claim"],
            "origin": "abstract",
            "change_low": row["change_low"],
            "change_high": row["change_high"],
            "conditions": "8 x V100 32 GB",
            "backend": "published",
            "device": "8 x V100 32 GB",
            "source": row["source"],
            "note": f"against the {row['versus']}; the abstract names neither model nor skew",
        }


def _published() -> Iterator[dict[str, Any]]:
    """Work the claims out from the published figures, as from a run."""
    table = load_published("skew")
    table = table[table["comparison"].isin(["systems", "both"]) & table["exact"]]
    for skew, rows in table[table["router.skew"] >= HEAVY].groupby("router.skew"):
        by_system = rows.set_index("system")
        # Per sequence the time to first token is the inverse of throughput, so both have the same next-best baseline.
        throughput = by_system["throughput_tokens_per_s"]
        best = str(throughput.drop(OUR_SYSTEM).idxmax())
        ratio = float(throughput[OUR_SYSTEM] / throughput[best])
        shared = {
            "origin": "published", "skew": skew, "baseline": best, "backend": "published",
            "device": rows["device"].iloc[0], "source": rows["source"].iloc[0],
            "conditions": f"Switch-Base-128, 8 GPUs, {_batches(by_system['batch_size'], best)}, 1,024 tokens each",
        }  # fmt: skip
        yield shared | {"claim": "throughput", "change": ratio - 1}
        yield shared | {"claim": "ttft", "change": 1 / ratio - 1, "note": _whole_batch(by_system["ttft_s"], best)}
    breakdown = load_published("breakdown").groupby("system")["idle_s"].mean()
    found = load_published("breakdown").iloc[0]
    yield {
        "claim": "idle", "origin": "published", "skew": found["router.skew"], "baseline": "static_ep",
        "change": float(breakdown[OUR_SYSTEM] / breakdown["static_ep"]) - 1, "backend": "published",
        "device": found["device"], "source": "sacs-epfl/HarMoEny: timebreakdown/",
        "conditions": "Switch-Base-128, 8 GPUs, 48 sequences per GPU, 1,024 tokens each, ten hot experts",
        "note": "from the time breakdown; other conditions than the abstract's figure",
    }  # fmt: skip


def _counts(run: Run) -> bool:
    """Tell whether a run says something about the claims."""
    return _skew(run) >= HEAVY and OUR_SYSTEM in run.systems and bool(_baselines(run))


def _skew(run: Run) -> float:
    return float(run.manifest["point"].get("router.skew", 0.0))


def _baselines(run: Run) -> list[str]:
    """Return the systems to compare with: exact, no bounds, not our own."""
    return [
        name
        for name, kind in run.systems.items()
        if name != OUR_SYSTEM and kind["exact"] and kind["baseline"] and not kind["bound"]
    ]


def _of_run(run: Run) -> Iterator[dict[str, Any]]:
    """Compare HarMoEny with the baseline that a claim is about, by claim."""
    values = {
        "throughput": run.iterations.set_index(["system", "round"])["throughput_tokens_per_s"],
        "ttft": _per_sequence(run, run.iterations.set_index(["system", "round"])["ttft_s"]),
        "idle": _per_sequence(run, run.layers.groupby(["system", "round"])["idle_s"].sum()),
    }
    sizes = run.iterations.groupby("system")["num_sequences"].first() // run.manifest["world_size"]
    # "Up to": the policy that idles most is the one that the paper's largest figure is against.
    choose: dict[str, Callable[[pd.Series], Any]] = {
        "throughput": pd.Series.idxmax, "ttft": pd.Series.idxmin, "idle": pd.Series.idxmax,
    }  # fmt: skip
    for claim, series in values.items():
        medians = series.groupby("system").median()[_baselines(run)]
        baseline = str(choose[claim](medians))
        if not medians[baseline]:
            continue
        change = _change(run, series[OUR_SYSTEM], series[baseline])
        yield {
            "claim": claim,
            "origin": "simulated" if run.simulated else "measured",
            "skew": _skew(run),
            "change": change.median,
            **({} if run.simulated else {"change_low": change.low, "change_high": change.high}),
            "baseline": baseline,
            "conditions": f"{_conditions(run)}, {_batches(sizes, baseline)}, {_seq_len(run):,} tokens each",
            "backend": run.manifest["backend"],
            "device": run.manifest["device"],
            "num_rounds": change.n,
            "source": str(run.folder),
            "note": _whole_batch(run.iterations.groupby("system")["ttft_s"].median(), baseline)
            if claim == "ttft" and sizes.nunique() > 1
            else "",
        }


def _change(run: Run, ours: pd.Series, other: pd.Series) -> Estimate:
    """Return the relative change, paired by round."""
    ratio = run_ratio(run, ours, other)
    return Estimate(ratio.median - 1, ratio.low - 1, ratio.high - 1, ratio.n)


def _per_sequence(run: Run, series: pd.Series) -> pd.Series:
    """Divide by the sequences of the batch, which differ by system where the paper's batches are simulated."""
    return series / run.iterations.set_index(["system", "round"])["num_sequences"]


def _conditions(run: Run) -> str:
    """Name model and number of ranks."""
    model = run.manifest["model"]
    size = f"{model['num_experts']} experts x {model['num_moe_layers']} MoE layers, top-{model['top_k']}"
    return f"{model_name(run)} ({size}), {run.manifest['world_size']} ranks"


def _seq_len(run: Run) -> int:
    first = run.iterations.iloc[0]
    return int(first["input_tokens"] // first["num_sequences"])


def _batches(sizes: pd.Series, baseline: str) -> str:
    """Say how many sequences every rank has in a batch, of both systems where they differ."""
    ours, other = int(sizes[OUR_SYSTEM]), int(sizes[baseline])
    per_rank = f"{ours}" if ours == other else f"{ours} ({label(baseline)}: {other})"
    return f"{per_rank} sequences per rank"


def _whole_batch(ttft_s: pd.Series, baseline: str) -> str:
    """Say what the requests of a batch wait, where batches differ."""
    ours, other = float(ttft_s[OUR_SYSTEM]), float(ttft_s[baseline])
    return f"whole batches: {ours:.2f} s, {label(baseline)} {other:.2f} s"


def as_table(frame: pd.DataFrame) -> Table:
    """Lay the claims out for a terminal."""
    table = Table(title="Claims of arXiv 2506.12417", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "skew", "change", "against", "conditions"):
        table.add_column(name, justify="right" if name in ("skew", "change") else "left", overflow="fold")
    for claim, title in TITLES.items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in frame[frame["claim"] == claim].to_dict("records"):
            table.add_row(*cells(row))
    return table


def cells(row: dict[Any, Any]) -> tuple[str, str, str, str, str]:
    """Write a row for people: origin, skew, change with interval, baseline, conditions with the note."""
    known = [str(text) for text in (row["conditions"], _platform(row), row["note"]) if isinstance(text, str) and text]
    return (
        str(row["origin"]),
        "" if pd.isna(row["skew"]) else f"{row['skew']:g}",
        _change_cell(row),
        label(row["baseline"]) if isinstance(row["baseline"], str) else "",
        "; ".join(known),
    )


def _platform(row: dict[Any, Any]) -> str:
    if row["origin"] in COMMANDS and isinstance(row["backend"], str):
        return f"{row['backend']}, {row['device']}, {row['num_rounds']:.0f} rounds"
    return ""


def _change_cell(row: dict[Any, Any]) -> str:
    """Write a change with its interval, or the span that the abstract gives."""
    if row["origin"] == "abstract":
        return change_text(row)
    if pd.isna(row["change"]):
        return ""
    interval = "" if pd.isna(row["change_low"]) else f" [{row['change_low']:+.0%}, {row['change_high']:+.0%}]"
    return f"{row['change']:+.0%}{interval}"


def as_markdown(frame: pd.DataFrame) -> str:
    """Write the claims as one Markdown table per claim."""
    parts = []
    for claim, title in TITLES.items():
        rows = [cells(row) for row in frame[frame["claim"] == claim].to_dict("records")]
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        head = ["| | skew | change | against | conditions |", "| --- | --- | --- | --- | --- |"]
        parts.append("\n".join([f"**{title}**", "", *head, *lines]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the table and write it as CSV and Markdown."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ", ".join(str(folder) for folder in FOLDERS)
    parser.add_argument("folder", nargs="*", type=Path, help=f"folders of runs (default: {default})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where claims.csv and claims.md go (default: {OUT})")
    arguments = parser.parse_args()
    for folder in arguments.folder:
        if not folder.is_dir():
            parser.error(f"folder: {str(folder)!r} does not exist, must be a folder of runs")
    try:
        frame = claims(arguments.folder or FOLDERS)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(as_table(frame))
    write_text(arguments.out / "claims.csv", frame.to_csv(index=False, float_format="%.4g"))
    write_text(arguments.out / "claims.md", as_markdown(frame))
    print(arguments.out / "claims.csv")
    print(arguments.out / "claims.md")


if __name__ == "__main__":
    main()
