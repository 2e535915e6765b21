"""How long ranks take beside what the cost model says: drawn from the spread that its hardware states."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from experiments.routers.base import FloatArray
from harmoeny.hardware import Hardware

#: Tells the seed of the ranks' factors from that of the round's.
_OF_RANKS = 1


class Jitter:
    """Factors on the time of everything that a rank does by itself, logarithmically normal with a median of 1.

    One belongs to a round, and all ranks share it: the machine's drift. The other is drawn anew for every layer and
    rank. Where the hardware states no spread, both are 1. All systems, and all points with the same seed, have the same
    factors (common random numbers): where two differ in the same round, the machine is not why.
    """

    def __init__(self, hardware: Hardware, world_size: int, seed: int) -> None:
        """Start before the first round.

        Args:
            hardware: has the spreads.
            world_size: number of ranks.
            seed: of the run.
        """
        self._hardware, self._world_size, self._seed = hardware, world_size, seed
        self._round_factor = 1.0
        self._rng = np.random.default_rng(seed)

    def begin_round(self, loop: str, index: int) -> None:
        """Draw the factor of a loop's round, and start over with those of its layers."""
        key = [self._seed, crc32(loop.encode()), index]
        self._round_factor = float(np.exp(self._hardware.round_spread * np.random.default_rng(key).standard_normal()))
        self._rng = np.random.default_rng([*key, _OF_RANKS])

    def pace(self) -> FloatArray:
        """Return float64 ``[world_size]``, how many times as long every rank takes for its part of the next layer."""
        own: FloatArray = np.exp(self._hardware.rank_spread * self._rng.standard_normal(self._world_size))
        return self._round_factor * own
