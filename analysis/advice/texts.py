"""How numbers and systems are written on the page of advice."""

from __future__ import annotations

import json
from collections.abc import Sequence

from analysis.advice.choose import Verdict
from analysis.advice.gains import Gain
from analysis.data.load import Run
from analysis.present.style import label
from analysis.present.table import model_name

#: Systems named beside the first in a row.
_MOST_NAMED = 3
#: Options that say how much room there is for experts, which is the same for all, and how the runtime executes plans.
_COMMON = (
    "num_slots", "spare_slots", "redundant_experts_per_rank", "num_nodes", "num_groups", "placement", "fetch",
    "num_stages", "work_order",
)  # fmt: skip
NOTHING = "do nothing"


def size(one: Verdict) -> str:
    """Return the first cell of a row: tokens per rank, and whose passes have so many."""
    return f"{one.tokens:,}, {'prefill' if one.is_prefill else 'decode'}"


def badges(run: Run) -> list[str]:
    """Say in a few words each what a run's numbers are of."""
    model = run.manifest["model"]
    return [
        kind_of(run),
        f"routing: {run.manifest['dataset']['name']}",
        f"{model['num_experts']} experts, top-{model['top_k']}, {model['num_moe_layers']} MoE layers",
        "whole model" if run.manifest["scope"] == "model" else "MoE layers only",
    ]


def model_text(run: Run) -> str:
    """Name the model; of bare MoE layers their sizes."""
    sizes = [run.config["model"].get(name) for name in ("hidden_size", "intermediate_size")]
    if run.manifest["scope"] == "model" or None in sizes:
        return model_name(run)
    return f"MoE layers of {run.manifest['model']['num_experts']} experts ({sizes[0]} x {sizes[1]})"


def provenance(run: Run) -> list[str]:
    """Say where a run's numbers come from, and what is not in them."""
    about = run.manifest
    if not run.simulated:
        return [
            f"All numbers were measured: {about['world_size']} ranks ({about['backend']}) on {about['device']}.",
            "Kernels and runtime are this harness's, not another engine's.",
        ]
    return [
        f"All numbers are simulated: {about['device']} ({about.get('hardware_source')}).",
        "Not modelled: weights and tokens that share a link, kernels of other engines, and whatever is not in the "
        "simulated part of the model (docs/simulator.md).",
    ]


def origin(run: Run) -> str:
    """Say what a run can be made again with."""
    about = run.manifest
    revision = str((about.get("git") or {}).get("revision"))[:12]
    return (
        f"Revision {revision}, {about.get('ended_at')}; python run.py experiment={about['experiment']}, with the "
        "options in config.yaml of every run."
    )


def kind_of(run: Run) -> str:
    """Say in a word what a run's numbers are."""
    return "simulated" if run.simulated else "measured"


def gain_text(gain: Gain) -> str:
    """Write a gain with its interval."""
    return f"{gain.gain:.2f} [{gain.low:.2f}, {gain.high:.2f}]"


def names(gains: Sequence[Gain]) -> str:
    """Name systems."""
    return ", ".join(label(gain.system) for gain in gains)


def use(one: Verdict) -> str:
    """Write what to use at a point, and what it gains."""
    return NOTHING if one.best is None else f"{label(one.best.system)} {gain_text(one.best)}"


def next_ones(one: Verdict) -> str:
    """Name the systems that follow, with their gains."""
    others = [gain for gain in one.gains if gain is not one.best][:_MOST_NAMED]
    return "; ".join(f"{label(gain.system)} {gain.gain:.2f}" for gain in others)


def scope_text(run: Run) -> str:
    """Say what the throughput is of; empty: of the whole model."""
    return "" if run.manifest["scope"] == "model" else " in the MoE layers"


def span(sizes: Sequence[int]) -> str:
    """Write sizes in ascending order for people."""
    few = " and ".join(f"{number:,}" for number in sizes)
    return f"{few if len(sizes) < 3 else f'{sizes[0]:,} to {sizes[-1]:,}'} tokens per rank"


def size_of(number: float) -> str:
    """Write bytes."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def settled(run: Run) -> list[str]:
    """Say what second settings of systems are, and where the first ones are explained."""
    first: dict[str, str] = {}
    found = []
    for system in run.systems:
        usual = options_of(run, first.setdefault(_policy(run, system), system))
        own = {name: value for name, value in options_of(run, system).items() if value != usual.get(name)}
        if own:
            found.append(f"{label(system)}: " + ", ".join(f"{name}={value}" for name, value in own.items()))
    return [*([f"Settings: {'; '.join(found)}."] if found else []), "What each system does: docs/systems.md."]


def options_of(run: Run, system: str) -> dict[str, str]:
    """Return the options of a system that are its own, as they are written on the command line.

    A second setting has those of its policy's first one where it says nothing.
    """
    first = next(other for other in run.systems if _policy(run, other) == _policy(run, system))
    options = {**(run.systems[first].get("options") or {}), **(run.systems[system].get("options") or {})}
    return {
        name: f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
        for name, value in options.items()
        if name not in _COMMON and isinstance(value, bool | int | float | str) and not name.endswith("_s")
    }


def _policy(run: Run, system: str) -> str:
    return str(run.systems[system].get("policy", system))
