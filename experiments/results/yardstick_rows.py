"""From what the ranks' yardsticks took to the rows of the result schema (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from experiments.results.layer_rows import Platform


@dataclass(frozen=True)
class YardstickTime:
    """What the yardstick of a rank took at one end of a point's round.

    Attributes:
        round: round of interleaved systems.
        moment: 0: before the first of the point's systems, 1: after the last.
        rank: the rank.
        product_s: time of the matrix product.
        copy_s: time of the copy.
    """

    round: int
    moment: int
    rank: int
    product_s: float
    copy_s: float


def yardstick_frame(taken: Sequence[YardstickTime], platform: Platform) -> pd.DataFrame:
    """Return the rows of ``yardstick.parquet``."""
    frame = pd.DataFrame([asdict(one) for one in taken]).assign(**asdict(platform))
    return frame.sort_values(["round", "moment", "rank"], ignore_index=True)
