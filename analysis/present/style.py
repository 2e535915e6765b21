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
    "harmoeny_tokens": Look("#A64100", "s"),
    "static_ep": Look("#0072B2", "s"),
    "even_split": Look("#009E73", "^"),
    "drop": Look("#999999", "v"),
    "deepspeed_moe": Look("#CC79A7", "D"),
    "fastmoe": Look("#56B4E9", "P"),
    "fastermoe": Look("#44AA99", "X"),
    "exflow": Look("#332288", "<"),
    "eplb": Look("#882255", ">"),
    "eplb_lp": Look("#AA4499", "p"),
    "harmoeny_paper_order": Look("#F0A58F", "h"),
    "deepspeed_moe_drop": Look("#7B3F61", "d"),
    "ultraep": Look("#1F78B4", "*"),
    "llep": Look("#B15928", "H"),
    "moonep": Look("#6A3D9A", "8"),
    "metro": Look("#B2DF8A", "d"),
    "trtllm_eplb": Look("#33A02C", "P"),
    "lplb": Look("#FB9A99", "p"),
    "libra": Look("#A6761D", "X"),
    "flashlb": Look("#CAB2D6", ">"),
    "waterfill": Look("#1B7F9E", "v"),
    "hybrimoe": Look("#1B8A3D", "h"),
    "cpu_gpu_lru": Look("#7F1D1D", "8"),
    "gpu_ndp": Look("#3B8EC2", "^"),
    "pregated": Look("#999933", "*"),
    "on_demand": Look("#888888", "v"),
    "eps_moe": Look("#C2479F", "D"),
    "ideal": Look("#000000", "_"),
}
#: Markers of variants, and how much of their system's colour is left: the rest is white, or below 0 black.
_VARIANT_MARKERS = "sDv^<>pP*X"
_VARIANT_SHARES = (1.0, 0.7, 0.5, -0.75, -0.5)
_OTHERS = (Look("#117733", "h"), Look("#88CCEE", "d"), Look("#DDCC77", "*"), Look("#661100", "8"))

#: Data sets and their routing are no systems: from dark to light, so that they are told apart in grey, too.
_DATASET_COLOURS = ("#000000", "#414487", "#2A788E", "#22A884", "#7AD151", "#BDB000")
_DATASET_MARKERS = "osD^vP"
_DATASETS = ("pydoc", "constant", "skewed_tokens", "random", "bookcorpus", "wikitext", "wmt19", "arxiver", "cocktail")

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
    "harmoeny_tokens": "HarMoEny, by tokens",
    "harmoeny_paper": "HarMoEny, the paper's rule",
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
    "ultraep": "UltraEP",
    "llep": "LLEP",
    "moonep": "MoonEP",
    "metro": "METRO",
    "trtllm_eplb": "TensorRT-LLM EPLB",
    "lplb": "LPLB",
    "flashlb": "FlashLB",
    "libra": "Libra",
    "waterfill": "Waterfill",
    "hybrimoe": "HybriMoE",
    "cpu_gpu_lru": "CPU-GPU LRU",
    "gpu_ndp": "GPU-NDP",
    "pregated": "Pre-gated MoE",
    "on_demand": "On demand",
    "eps_moe": "EPS-MoE",
    "ideal": "Ideal (reference)",
}

RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 250,
}


def look(system: str) -> Look:
    """Return a system's look, the same everywhere.

    A variant, such as ``harmoeny_threshold_8``, has a shade of its system's colour, and one that nobody foresaw gets a
    look from its name.
    """
    if system in _LOOKS:
        return _LOOKS[system]
    digest = zlib.crc32(system.encode())
    known = max((name for name in _LOOKS if system.startswith(f"{name}_")), key=len, default=None)
    if known is None:
        return _OTHERS[digest % len(_OTHERS)]
    share = _VARIANT_SHARES[digest // len(_VARIANT_MARKERS) % len(_VARIANT_SHARES)]
    return Look(_shade(_LOOKS[known].colour, share), _VARIANT_MARKERS[digest % len(_VARIANT_MARKERS)])


def dataset_look(dataset: str) -> Look:
    """Return a data set's look, the same everywhere."""
    index = _DATASETS.index(dataset) if dataset in _DATASETS else zlib.crc32(dataset.encode())
    return Look(_DATASET_COLOURS[index % len(_DATASET_COLOURS)], _DATASET_MARKERS[index % len(_DATASET_MARKERS)])


def _shade(colour: str, share: float) -> str:
    """Mix a colour with white, or for a negative share with black; the share is what is left of the colour."""
    rest = 255 * (1 - share) if share >= 0 else 0.0
    parts = (abs(share) * int(colour[i : i + 2], 16) + rest for i in (1, 3, 5))
    return "#" + "".join(f"{round(part):02X}" for part in parts)


#: Letters for what a system may see of the routing, and what they mean.
KNOWLEDGE = {
    "history": ("H", "H: places experts by earlier batches"),
    "lookahead": ("L", "L: by a prediction made before the gate"),
    "exact": ("X", "X: plans by the batch's own counts"),
}


def marked(system: str, knows: object) -> str:
    """Return a system's name with the letters for what it may see of the routing, if that is anything.

    Args:
        system: the system.
        knows: as in ``summary.json``; anything but a text: not known.
    """
    known = knows.split(", ") if isinstance(knows, str) else []
    letters = [letter for name, (letter, _) in KNOWLEDGE.items() if name in known]
    return f"{label(system)} ({', '.join(letters)})" if letters else label(system)


def label(system: str) -> str:
    """Return a system's name for people; a variant, such as ``harmoeny_threshold_8``, is named after what it varies."""
    known = max((name for name in _LABELS if f"{system}_".startswith(f"{name}_")), key=len, default=None)
    if known is None:
        return system
    return ", ".join(part for part in (_LABELS[known], system[len(known) :].replace("_", " ").strip()) if part)
