"""How wrong the simulator is about gains: its predictions against what was measured, as results/validation has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from results_schema.advising import STATIC

FOLDER = Path(__file__).resolve().parents[2] / "results" / "validation"


@dataclass(frozen=True)
class ValidatedError:
    """How far predicted gains over static expert parallelism are from measured ones.

    Attributes:
        median: of the absolute relative errors.
        points: their number.
        machine: that was measured.
        is_other: whether the machine that advice is for is another one, of which nothing was measured.
    """

    median: float
    points: int
    machine: str
    is_other: bool


def validated_error(device: str, folder: Path = FOLDER) -> ValidatedError:
    """Return the error on the kind of machine that a description is of; of the worst kind where it is of none.

    Args:
        device: name of the hardware, as manifests have it.
        folder: with the tables that ``make validate`` writes.

    Raises:
        ValueError: a table is missing or damaged.
    """
    try:
        kinds = {
            "a DGX-1 (8 V100)": (("dgx1_v100",), _gains(pd.read_csv(folder / "paper_throughputs.csv"))),
            "H200s and ranks of one GPU": (
                ("h200", "h100", "dgx_h100", "hgx_h200"),
                [*_gpu_gains(pd.read_csv(folder / "gpus.csv")), *_gains(pd.read_csv(folder / "gpu_sweep.csv"))],
            ),
            "two CPU cores": (("cpu", "this_machine", "emulated"), _gains(pd.read_csv(folder / "ranks.csv"))),
        }
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no readable validation ({error}); make validate writes it") from error
    errors = {
        machine: ValidatedError(float(np.median(np.abs(found))), len(found), machine, is_other=False)
        for machine, (_, found) in kinds.items()
    }
    for machine, (names, _) in kinds.items():
        if device.startswith(names):
            return errors[machine]
    worst = max(errors.values(), key=lambda error: error.median)
    return ValidatedError(worst.median, worst.points, worst.machine, is_other=True)


def _gains(frame: pd.DataFrame) -> list[float]:
    """Return the relative errors of every system's ratio to static placement, of cases that nothing was fitted on."""
    errors = []
    for _, rows in frame[~frame["calibration"]].groupby("case"):
        ratio = rows.set_index("system")["predicted"] / rows.set_index("system")["published"]
        if STATIC in ratio:
            errors += (ratio.drop(STATIC) / ratio[STATIC] - 1).tolist()
    return errors


def _gpu_gains(frame: pd.DataFrame) -> list[float]:
    """Return those of published speed-ups, and of layers measured with and without balance one after the other."""
    rows = frame[~frame["calibration"]]
    errors = rows.loc[rows["unit"] == "speed-up", "error"].tolist()
    times = rows[rows["unit"] == "ms"]
    previous = times.shift()
    pairs = (times["system"] == "balanced") & (previous["system"] == STATIC) & (times["case"] == previous["case"])
    ratio = (previous["predicted"] / times["predicted"]) / (previous["published"] / times["published"])
    return [*errors, *(ratio[pairs] - 1).tolist()]
