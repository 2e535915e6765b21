"""How numbers and systems are written on the page of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.advice.choose import Verdict
from analysis.advice.gains import Gain
from analysis.data.load import Run
from analysis.present.style import label
from analysis.present.table import model_name

#: Systems named beside the first in a row.
_MOST_NAMED = 3
#: Options that are each other's answer to the room for experts, and the same for all.
_ROOM = ("num_slots", "spare_slots", "redundant_experts_per_rank")
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
    return f"Revision {revision}, {about.get('ended_at')}; python run.py experiment={about['experiment']}"


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


def span(sizes: Sequence[int]) -> str:
    """Write sizes in ascending order for people."""
    few = " and ".join(f"{number:,}" for number in sizes)
    return f"{few if len(sizes) < 3 else f'{sizes[0]:,} to {sizes[-1]:,}'} tokens per rank"


def size_of(number: float) -> str:
    """Write bytes."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def settled(run: Run) -> list[str]:
    """Say what second settings of systems are, and where the first ones are explained."""
    found = _settings(run)
    return [*([f"Settings: {'; '.join(found)}."] if found else []), "What each system does: docs/systems.md."]


def _settings(run: Run) -> list[str]:
    """Say of every system that is a second setting of a policy what is set."""
    first: dict[str, Mapping[str, Any]] = {}
    found = []
    for system, kind in run.systems.items():
        options = kind.get("options") or {}
        usual = first.setdefault(str(kind.get("policy", system)), options)
        set_to = {name: value for name, value in options.items() if value != usual.get(name) and name not in _ROOM}
        if usual is not options and set_to:
            found.append(f"{label(system)}: " + ", ".join(f"{name}={value}" for name, value in set_to.items()))
    return found
