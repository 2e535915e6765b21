"""How systems look: one colour and marker each, the same in every figure, safe for colour-blind readers and print."""

from __future__ import annotations

import zlib
from typing import NamedTuple


class Look(NamedTuple):
    """Colour, marker and hatch of a system."""

    colour: str
    marker: str


# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), extended by Paul Tol's muted one.
_LOOKS = {
    "harmoeny": Look("#D55E00", "o"),
    "harmoeny_sync": Look("#E69F00", "o"),
    "static_ep": Look("#0072B2", "s"),
    "even_split": Look("#009E73", "^"),
    "drop": Look("#999999", "v"),
    "deepspeed_moe": Look("#CC79A7", "D"),
    "fastmoe": Look("#56B4E9", "P"),
    "fastermoe": Look("#44AA99", "X"),
    "exflow": Look("#332288", "<"),
    "eplb": Look("#882255", ">"),
    "eplb_lp": Look("#AA4499", "p"),
    "ideal": Look("#000000", "_"),
}
_OTHERS = (Look("#117733", "h"), Look("#88CCEE", "d"), Look("#DDCC77", "*"), Look("#661100", "8"))

#: Parts of a layer: what computes in strong colours, what moves data in lighter ones, idling in none.
PHASE_COLOURS = {
    "route": "#CC79A7",
    "metadata": "#882255",
    "plan": "#F0E442",
    "dispatch": "#56B4E9",
    "compute": "#009E73",
    "wait for weights": "#D55E00",
    "idle": "#FFFFFF",
    "combine": "#0072B2",
}

_LABELS = {
    "harmoeny": "HarMoEny",
    "harmoeny_sync": "HarMoEny, blocking fetches",
    "harmoeny_paper_order": "HarMoEny, the paper's order",
    "static_ep": "Static EP",
    "even_split": "Even split",
    "drop": "Drop",
    "deepspeed_moe": "DeepSpeed-MoE",
    "fastmoe": "FastMoE",
    "fastermoe": "FasterMoE",
    "exflow": "ExFlow",
    "eplb": "EPLB",
    "eplb_lp": "EPLB + LP",
    "ideal": "Ideal (bound)",
}

RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
}


def look(system: str) -> Look:
    """Return a system's look; a system that nobody foresaw gets one from its name, the same everywhere."""
    return _LOOKS.get(system) or _OTHERS[zlib.crc32(system.encode()) % len(_OTHERS)]


def label(system: str) -> str:
    """Return a system's name for people; a variant, such as ``harmoeny_threshold_8``, is named after what it varies."""
    known = max((name for name in _LABELS if f"{system}_".startswith(f"{name}_")), key=len, default=None)
    if known is None:
        return system
    return ", ".join(part for part in (_LABELS[known], system[len(known) :].replace("_", " ").strip()) if part)
