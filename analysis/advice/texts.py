"""How numbers and systems are written on the page of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.advice.choose import Verdict
from analysis.advice.gains import Gain
from analysis.data.load import Run
from analysis.present.style import label

#: Systems named beside the first in a row.
_MOST_NAMED = 3
#: Options that are each other's answer to the room for experts, and the same for all.
_ROOM = ("num_slots", "spare_slots", "redundant_experts_per_rank")
NOTHING = "do nothing"


def size(one: Verdict) -> list[str]:
    """Return the first two cells of a row: the phase, and tokens per rank."""
    return ["prefill" if one.is_prefill else "decode", f"{one.tokens:,}"]


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


def settings(run: Run) -> list[str]:
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
