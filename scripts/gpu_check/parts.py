"""The parts of a check: a command each, how long it may take, and what its results must reach."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from analysis.data.load import find_runs
from analysis.data.stats import Estimate, median_interval
from analysis.data.summary import summarise

#: Ranks on one GPU that the skew sweep is run with; on so many there are goals.
RANKS, JUDGED_RANKS = (8, 4, 2), 4
#: The library's tests, which need no more packages than a check; the others are not even collected without theirs.
CUDA_TESTS = "tests/harmoeny"
THROUGHPUT = "throughput_tokens_per_s"
NUMBERS = "numbers.json"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: was measured.
        value: as it is shown.
        goal: in words; empty where there is none.
        met: whether the value reaches it; None where there is none.
    """

    what: str
    value: str
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its files.
        what: it shows.
        command: that makes the results, given the folder they go to.
        limit_s: it is stopped after that.
        rows: reads the results.
    """

    name: str
    what: str
    command: Callable[[Path], list[str]]
    limit_s: float
    rows: Callable[[Path], list[Row]]


def all_parts(device_type: str, *, rehearsal: bool) -> list[Part]:
    """Return the parts, the longest first.

    Args:
        device_type: ``cuda`` or ``cpu``.
        rehearsal: with sizes that a CPU is through with in seconds.
    """
    rounds = "3" if rehearsal else "11"
    sizes = ["--shape", "tiny" if rehearsal else "qwen3", "--device", device_type, "--rounds", rounds]

    def measuring(name: str, *arguments: str) -> Callable[[Path], list[str]]:
        return lambda out: _module(f"scripts.{name}", *arguments, "--json", str(out / NUMBERS))

    def tests(out: Path) -> list[str]:
        xml = f"--junitxml={out / 'tests.xml'}"
        at_once = ["-n", "4"] if find_spec("xdist") else []
        return _module("pytest", "-m", "cuda", "-p", "no:cacheprovider", *at_once, xml, CUDA_TESTS)

    model = measuring("gpu_check.model", *sizes)
    prefetch = measuring("bench.prefetch", "--rounds", rounds)
    layer, groups = (measuring(f"gpu_check.{name}", *sizes) for name in ("layer", "groups"))
    parts = [
        *(_sweep(n, device_type, rehearsal=rehearsal) for n in ((2,) if rehearsal else RANKS)),
        Part("model", "a Qwen3-MoE-shaped model beside Transformers' own experts", model, 120, _model_rows),
        Part("cuda_tests", "the tests that need a CUDA device", tests, 120, _test_rows),
        Part("prefetch", "how much of the fetches computation hides", prefetch, 60, _prefetch_rows),
        Part("layer", "a MoE layer beside its grouped matrix products", layer, 60, _layer_rows),
        Part("groups", "grouped products of few large and many small slices", groups, 30, _groups_rows),
        _smoke(device_type),
    ]
    return [replace(part, rows=_without_goals(part.rows)) for part in parts] if rehearsal else parts


def _without_goals(rows: Callable[[Path], list[Row]]) -> Callable[[Path], list[Row]]:
    """What a CPU does with tiny sizes reaches or misses no goal of a GPU."""
    return lambda out: [replace(row, goal="", met=None) for row in rows(out)]


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _smoke(device_type: str) -> Part:
    """Return the smoke experiment on one rank, with the checks of all systems."""
    options = {
        "experiment": "smoke", "system": "[all]", "world_size": 1, "device": device_type, "timeout_s": 60,
        "wandb.mode": "disabled",
    }  # fmt: skip
    return Part("smoke", "all systems on one rank", _run(options), 150, _smoke_rows)


def _run(options: dict[str, Any]) -> Callable[[Path], list[str]]:
    given = [f"{name}={value}" for name, value in options.items()]
    return lambda out: [sys.executable, "run.py", *given, f"results_dir={out}"]


def _smoke_rows(out: Path) -> list[Row]:
    runs = find_runs(out)
    failed = sorted({name for run in runs for name in run.manifest.get("failed_systems") or {}})
    systems = {name for run in runs for name in run.systems} - set(failed)
    value = f"{len(systems)} systems pass, {len(failed)} fail" + (f": {', '.join(failed)}" if failed else "")
    return [Row("checks on one rank", value, "all pass", bool(systems) and not failed)]


def sweep_options(num_ranks: int, *, rehearsal: bool = False) -> dict[str, Any]:
    """Return what tells the skew sweep of so many ranks from ``experiment=skew_sweep``: options and their values."""
    hidden_size, intermediate_size, num_experts, top_k = (32, 64, 16, 2) if rehearsal else (2048, 768, 128, 8)
    return {
        "experiment": "skew_sweep",
        "model": "moe_stack",
        "model.gated": "true",
        "model.hidden_size": hidden_size,
        "model.intermediate_size": intermediate_size,
        "model.num_experts": num_experts,
        "model.top_k": top_k,
        # More than one, as in a model, where most layers find the host's code in its caches; all ranks' experts of all
        # layers must fit on the GPU, as one system holds them everywhere.
        "model.num_layers": 2 if rehearsal else max(1, 8 // num_ranks),
        "model.dtype": "float32" if rehearsal else "bfloat16",
        "router.num_hot": top_k,
        "router.skew": "0,0.9",
        "batch_size": 2 if rehearsal else 8,
        "seq_len": 16 if rehearsal else 512,
        # So many that a system which follows earlier batches has settled in most of them.
        "rounds": 3 if rehearsal else 11,
        "world_size": num_ranks,
        "system": "[all]",
    }


def _sweep(num_ranks: int, device_type: str, *, rehearsal: bool) -> Part:
    """Return the skew sweep, the main experiment, with some ranks on one GPU, or on this CPU as a rehearsal."""
    options = sweep_options(num_ranks, rehearsal=rehearsal) | {
        "device": device_type, "timeout_s": 60, "wandb.mode": "disabled",
    }  # fmt: skip
    if device_type == "cuda":
        options["ranks_per_gpu"] = num_ranks
    what = f"the main experiment on {num_ranks} ranks of one GPU"
    return Part(f"skew_sweep_{num_ranks}", what, _run(options), 240, _sweep_rows(num_ranks))


def _ratio(entry: dict[str, Any]) -> str:
    return f"{entry['median']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _at_most(what: str, entry: dict[str, Any], limit: float) -> Row:
    return Row(what, _ratio(entry), f"at most {limit:g}", entry["median"] <= limit)


def _model_rows(out: Path) -> list[Row]:
    found = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
    return [
        _at_most(f"{phase}: time to Transformers' grouped_mm", found[phase]["harmoeny"]["ratio_to_grouped_mm"], limit)
        for phase, limit in (("prefill", 1.05), ("decode", 1.0))
    ]


def _layer_rows(out: Path) -> list[Row]:
    found = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
    rows = []
    for size, limit in (("prefill", 1.6), ("decode", None)):
        entry = found[size]["harmoeny"]["ratio_to_products"]
        what = f"layer of {found[size]['num_tokens']} tokens: time to its grouped products"
        rows.append(Row(what, _ratio(entry)) if limit is None else _at_most(what, entry, limit))
    return rows


def _groups_rows(out: Path) -> list[Row]:
    found = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
    return [Row(f"{name}: time to even slices", _ratio(entry["ratio_to_even"])) for name, entry in found.items()]


def _prefetch_rows(out: Path) -> list[Row]:
    found = json.loads((out / NUMBERS).read_text(encoding="utf-8"))["rows"]
    rows = []
    goals: dict[str, tuple[str, Callable[[list[float]], bool]]] = {
        "async": ("at least 90 % from the threshold up", lambda shares: min(shares) >= 0.9),
        "sync": ("none (at most 5 %)", lambda shares: max(shares) <= 0.05),
    }
    for strategy, (goal, reaches) in goals.items():
        shares = [row["hidden_share"] for row in found if row["strategy"] == strategy and row["times_threshold"] >= 1]
        value = f"{min(shares):.0%} to {max(shares):.0%}"
        rows.append(Row(f"{strategy}: share of the fetch time that is hidden", value, goal, reaches(shares)))
    return rows


def _test_rows(out: Path) -> list[Row]:
    suite = ET.parse(out / "tests.xml").getroot()  # noqa: S314  (pytest wrote it just now)
    cases = list(suite.iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    value = f"{len(cases) - len(bad) - len(skipped)} passed, {len(bad)} failed, {len(skipped)} skipped"
    return [Row("CUDA tests", value, "all pass", bool(cases) and not bad and not skipped)]


def _sweep_rows(num_ranks: int) -> Callable[[Path], list[Row]]:
    def rows(out: Path) -> list[Row]:
        runs = {round(float(run.config["router"]["skew"]), 3): run for run in find_runs(out)}
        if not {0.0, 0.9} <= set(runs):
            raise ValueError(f"{out}: finished at skews {sorted(runs)}, must be finished at 0 and 0.9")
        even = summarise(runs[0.0])["systems"]
        best = max(
            (name for name, entry in even.items() if entry["exact"] and not entry["bound"]),
            key=lambda name: even[name][THROUGHPUT]["median"],
        )
        top = even[best][THROUGHPUT]["median"]
        values = runs[0.9].values

        def kept(system: str) -> Estimate:
            return median_interval(values.loc[values["system"] == system, THROUGHPUT] / top)

        found = []
        goals: dict[str, tuple[str, Callable[[float], bool]]] = {
            "harmoeny": ("at least 0.93", lambda share: share >= 0.93),
            "static_ep": ("about half", lambda share: share <= 0.7),
        }
        for system, (goal, reaches) in goals.items():
            estimate = kept(system)
            value = f"{estimate.median:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
            what = f"{num_ranks} ranks, skew 0.9: {system} to the best at skew 0 ({best})"
            asked = num_ranks == JUDGED_RANKS
            found.append(Row(what, value, goal if asked else "", reaches(estimate.median) if asked else None))
        return found

    return rows
