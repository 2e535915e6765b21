"""The routing that the authors of HarMoEny published (``expert_freq_*.csv``), read as a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.routing.trace import RecordedRouting
from harmoeny.placement import IntArray

#: What tells the series of a file apart: its layout is one of these, then iteration and layer, then every expert.
CASE_COLUMNS = ("dataset", "router_skew")


def read_published(path: Path, case: str | None) -> RecordedRouting:
    """Read one series of a file: tokens per expert of all ranks together, by iteration and MoE layer.

    The authors counted top-1 routing, also where the model chooses more experts. The rank that a token belongs to was
    not recorded.

    Args:
        path: the file.
        case: the data set, or the router's skew.

    Raises:
        ValueError: the file is cut off, has another layout or contradicts itself (the row is named), or lacks the case.
    """
    frame, case_column = _read(path)
    cases = [f"{value:g}" if isinstance(value, float) else str(value) for value in frame[case_column]]
    known = list(dict.fromkeys(cases))
    if case not in known:
        raise ValueError(f"router.case: {case!r}, must be one of {', '.join(known)}, the {case_column}s in {path}")
    frame = frame[np.array(cases) == case]
    batches, layers = (int(frame[name].max()) + 1 for name in ("iteration", "layer_idx"))
    experts = _expert_columns(frame)
    counts: IntArray = np.full((batches, layers, 1, len(experts)), -1, dtype=np.int64)
    for number, batch, layer, row in zip(
        frame.index, frame["iteration"], frame["layer_idx"], frame[experts].to_numpy(), strict=True
    ):
        if counts[batch, layer, 0, 0] >= 0:
            raise ValueError(f"{_where(path, number)}: iteration {batch}, layer {layer} of {case} is there twice")
        counts[batch, layer, 0] = row
    if (counts < 0).any():
        batch, layer = np.argwhere(counts[:, :, 0, 0] < 0)[0]
        raise ValueError(f"{path}: no row for iteration {batch}, layer {layer} of {case}")
    name = f"skew {case}" if case_column == "router_skew" else str(case)
    return RecordedRouting(str(path), path.stem, name, 1, counts.sum(axis=3), counts)


def _read(path: Path) -> tuple[pd.DataFrame, str]:
    """Read a whole file and check every row."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: row {text.count(chr(10))} is cut off (no end of line)")
    header = text.partition("\n")[0].split(",")
    case_column = header[1] if len(header) > 1 else ""
    columns = ["", case_column, "iteration", "layer_idx", *(str(e) for e in range(len(header) - 4))]
    if case_column not in CASE_COLUMNS or header != columns or len(header) < 5:
        raise ValueError(
            f"{path}: the columns are not those of a published routing: '', dataset or router_skew, iteration, "
            "layer_idx, and the experts 0, 1, ..."
        )
    rows = [line.split(",") for line in text.splitlines()[1:]]
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{_where(path, i)}: {len(row)} values, must be {len(header)}")
        for name, value in zip(header, row, strict=True):
            if name != case_column and not (value.isascii() and value.isdigit()):
                raise ValueError(f"{_where(path, i)}: column {name!r} is {value!r}, must be a number of at least 0")
    if not rows:
        raise ValueError(f"{path}: no rows")
    frame = pd.DataFrame(rows, columns=header)
    numbers = [name for name in header if name != case_column]
    frame = frame.astype(dict.fromkeys(numbers, np.int64))
    if case_column == "router_skew":
        frame[case_column] = frame[case_column].astype(float)
    return frame, case_column


def _where(path: Path, index: int) -> str:
    return f"{path}: row {index + 1}"


def _expert_columns(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame.columns if name.isdigit()]
