"""What ranks that compute on one device at the same time take from each other."""

from __future__ import annotations

import numpy as np

from experiments.routers.base import FloatArray


def sharing_pace(alone_s: FloatArray, device_sharing: float) -> FloatArray:
    """Return how many times as long ranks of one device compute as each would alone; all begin at the same time.

    While ``n`` ranks compute, each needs ``1 + device_sharing * (n - 1)`` times as long as alone for the same work.

    Args:
        alone_s: float64 ``[world_size]``, what every rank takes alone.
        device_sharing: as of the hardware.

    Returns:
        float64 ``[world_size]``, at least 1.
    """
    order = np.argsort(alone_s, kind="stable")
    computing = np.arange(len(alone_s), 0, -1)
    end_s = np.empty_like(alone_s)
    end_s[order] = np.cumsum(np.diff(alone_s[order], prepend=0.0) * (1 + device_sharing * (computing - 1)))
    return np.divide(end_s, alone_s, out=np.ones_like(alone_s), where=alone_s > 0)
