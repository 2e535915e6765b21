"""When requests arrive: with the batch before them done (closed loop), at random times, or at recorded ones."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.datasets.kit.streams import read_text, refusing
from experiments.routers.base import FloatArray


@dataclass
class RequestOptions:
    """How requests come in; conf/config.yaml says what the values mean."""

    arrivals: str = "closed"
    rate_per_s: float | None = None
    per_round: int | None = None

    @property
    def open_loop(self) -> bool:
        """Whether requests come whether or not those before them are done."""
        return self.arrivals != "closed"

    def validate(self) -> None:
        """Check the options, and read the recorded times.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.per_round is not None and self.per_round < 1:
            raise ValueError(f"requests.per_round: {self.per_round}, must be at least 1, or null")
        if self.arrivals == "poisson":
            if self.rate_per_s is None or not 0 < self.rate_per_s < math.inf:
                raise ValueError(f"requests.rate_per_s: {self.rate_per_s}, must be above 0 with arrivals=poisson")
            return
        if self.rate_per_s is not None:
            raise ValueError(f"requests.rate_per_s: {self.rate_per_s}, must be null without requests.arrivals=poisson")
        if self.open_loop:
            times = self._recorded()
            if self.per_round is not None and self.per_round > len(times):
                raise ValueError(
                    f"requests.per_round: {self.per_round}, must be at most {len(times)}, the times in {self.arrivals}"
                )
        elif self.per_round is not None:
            raise ValueError(f"requests.per_round: {self.per_round}, must be null with requests.arrivals=closed")

    def times(self, seed: int, round_index: int, default: int) -> FloatArray:
        """Return float64 ``[num_requests]``, seconds from the start of a round, ascending; the same for all systems.

        Args:
            seed: of the run.
            round_index: random times differ from round to round, recorded ones do not.
            default: number of requests where the options say none.
        """
        if self.arrivals != "poisson":
            return self._recorded()[: self.per_round]
        rng = np.random.default_rng([seed, round_index])
        gaps = rng.exponential(1 / float(self.rate_per_s or 1), self.per_round or default)
        times: FloatArray = np.cumsum(gaps)
        return times

    def fingerprint(self) -> str:
        """Digest the recorded times; empty where there are none."""
        path = Path(self.arrivals)
        if self.arrivals in ("closed", "poisson") or not path.is_file():
            return ""
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def _recorded(self) -> FloatArray:
        path = Path(self.arrivals)
        if not path.is_file():
            raise ValueError(
                f"requests.arrivals: {self.arrivals!r}, must be closed, poisson, or a file with one time in s per line"
            )
        with refusing("requests.arrivals", path):
            lines = read_text(path).splitlines()
        times: list[float] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                time_s = float(line)
            except ValueError:
                time_s = math.nan
            if not math.isfinite(time_s) or (times and time_s < times[-1]):
                raise ValueError(
                    f"requests.arrivals: line {number} of {self.arrivals} is {line!r}, must be a time in s, not "
                    "before the one above"
                )
            times.append(time_s)
        if not times:
            raise ValueError(f"requests.arrivals: {self.arrivals!r} is empty, must hold one time in s per line")
        return np.array(times) - times[0]
