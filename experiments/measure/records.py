"""What one rank saw of one point in the measured rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.results.layer_rows import RankIteration
from experiments.results.yardstick_rows import YardstickTime


@dataclass
class Records:
    """What one rank saw of one point in the measured rounds.

    Attributes:
        iterations: forward passes.
        yardstick: what the machine's yardstick took before and after the point's systems, round by round.
    """

    iterations: list[RankIteration] = field(default_factory=list)
    yardstick: list[YardstickTime] = field(default_factory=list)
