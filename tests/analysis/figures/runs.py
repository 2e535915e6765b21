"""The numbers of the runs in conftest.py, and how tests read a drawn line."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from tests.synthetic import KINDS

SKEWS = [0.0, 0.5, 0.9]
FIVE = list(KINDS)
#: Two systems of other software beside a policy and ours, by the name of their policy.
OTHERS = {"harmoeny": [0.5, 1.0, 1.5], "static_ep": [1.0, 2.0, 3.0], "drop": [0.5, 0.5, 0.5]}
COUNTS = [[[90, 5, 3, 2], [25, 25, 25, 25], [4, 0, 0, 0]], [[25, 25, 25, 25], [25, 25, 25, 25], [1, 1, 1, 1]],
          [[70, 10, 10, 10], [40, 30, 20, 10], [2, 2, 0, 0]]]  # fmt: skip
STACKS = [0, 0, 1]


def lines_of(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.lines}
