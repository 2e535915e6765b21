"""Recorded routing of others: import it for router=trace, describe it, or convert it for a serving engine.

The format is recognised by the files' content. docs/traces.md says how to record each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.present.trace_figure import TraceShape, draw_trace
from experiments.routing.formats.base import ReadOptions
from experiments.routing.formats.read import FORMATS, read_routing, recognise
from experiments.routing.statistics import drift, imbalance, layer_dependence, popularity
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import read_about, write_trace
from results_schema.printing import print_anything

#: Formats that others read.
_TARGETS = ("sglang", "vllm", "mindspeed")


def import_trace(arguments: argparse.Namespace) -> None:
    """Write what others recorded as a trace for ``router=trace router.path=FILE``."""
    if arguments.out.suffix != ".parquet":
        raise ValueError(f"--out: {str(arguments.out)!r}, must end in .parquet")
    trace = _read(arguments)
    target = RecordedRouting(
        str(arguments.out), trace.model, trace.dataset, trace.top_k, trace.num_tokens, trace.counts, trace.paths
    )
    write_trace(target, f"import-{recognise(arguments.files).name}")
    print(_size(trace))
    print(arguments.out)


def describe_trace(arguments: argparse.Namespace) -> None:
    """Print what the routing is like, and draw it."""
    trace = _read(arguments)
    apart, chance = drift(trace)
    loads, unbalanced = popularity(trace), imbalance(trace, arguments.ranks)
    print(f"format:      {recognise(arguments.files).name}")
    print(f"size:        {_size(trace)}")
    print(
        f"popularity:  the most popular expert has {np.median(loads[:, 0]):.1f} times an even share in the median "
        f"layer, {loads[:, 0].min():.1f} to {loads[:, 0].max():.1f} in all"
    )
    print(
        f"imbalance:   {np.median(unbalanced):.2f} (median), {unbalanced.max():.2f} (most) largest over mean load of "
        f"{arguments.ranks} ranks with experts in blocks"
    )
    if len(apart):
        print(
            f"drift:       {apart[0]:.1%} of the load is on other experts one batch later, {apart[-1]:.1%} after "
            f"{len(apart)}; chance alone: {chance[0]:.1%}"
        )
    title = "Shared information" if trace.paths else "Imbalance, correlation"
    caption = f"{trace.model}, {trace.dataset}: {_size(trace)}. Recorded, not measured here."
    shape = TraceShape(loads, apart, chance, layer_dependence(trace), title, caption)
    print(f"figure:      {draw_trace(shape, arguments.out, arguments.files[0].stem)} (and .pdf)")


def convert_trace(arguments: argparse.Namespace) -> None:
    """Write the counts in a format that a serving engine reads."""
    trace = _read(arguments)
    FORMATS[arguments.to].write(trace, arguments.out)
    print(_size(trace))
    print(arguments.out)


def _read(arguments: argparse.Namespace) -> RecordedRouting:
    for name in ("merge", "batches", "top_k", "num_experts"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value}, must be at least 1")
    options = ReadOptions(
        num_experts=arguments.num_experts, top_k=arguments.top_k, case=arguments.case, phase=arguments.phase
    )
    about = read_about(arguments.files[0]) if recognise(arguments.files).name == "harmoeny" else {}
    names = (
        arguments.model or about.get("model", "unknown model"),
        arguments.dataset or about.get("dataset", "unknown data"),
    )
    return read_routing(
        arguments.files, options, names,
        merge=arguments.merge, num_batches=arguments.batches, token_paths=arguments.token_paths,
    )  # fmt: skip


def _size(trace: RecordedRouting) -> str:
    ranks = "1 rank (or not recorded)" if trace.world_size == 1 else f"{trace.world_size} ranks"
    tokens = int(np.median(trace.num_tokens.sum(axis=2)))
    return (
        f"{trace.num_batches} batches of {tokens:,} tokens (median), {trace.num_layers} MoE layers, "
        f"{trace.num_experts} experts, top-{trace.top_k}, {ranks}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.traces", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("import", import_trace), ("describe", describe_trace), ("convert", convert_trace)):
        command = commands.add_parser(name, help=str(function.__doc__), description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of one recording, in order")
        command.add_argument("--top-k", type=int, help="experts per token, where only counts are recorded")
        command.add_argument("--num-experts", type=int, help="experts per layer, where files name chosen ones alone")
        command.add_argument("--case", help="the series, of a file that has several")
        command.add_argument(
            "--phase", choices=("prefill", "decode"), default="decode", help="of requests (%(default)s)"
        )
        command.add_argument("--merge", type=int, default=1, metavar="N", help="make one batch of every N")
        command.add_argument("--batches", type=int, metavar="N", help="take the first N batches alone")
        command.add_argument("--model", help="name to remember")
        command.add_argument("--dataset", help="likewise")
        if name == "describe":
            command.add_argument("--ranks", type=int, default=8, help="ranks that experts would be on (%(default)s)")
            command.add_argument("--out", type=Path, default=Path("results/traces"), help="folder (%(default)s)")
        else:
            command.add_argument("--out", type=Path, required=True, help="file to write")
        if name == "convert":
            command.add_argument("--to", choices=_TARGETS, required=True, help="format")
            command.set_defaults(token_paths=False)
        else:
            command.add_argument("--token-paths", action="store_true", help="read the experts of every token, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    print_anything()
    given = _parser().parse_args(arguments)
    try:
        given.function(given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
