"""When requests arrive: with the batch before them done (closed loop), at random times, or at recorded ones.

Gaps between random arrivals are exponential (``poisson``), or gamma with a coefficient of variation of the user's: what
vLLM's ``bench serve`` calls ``--burstiness`` is 1 / cv^2.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.datasets.kit.streams import read_text, refusing
from experiments.routers.base import FloatArray

POISSON, GAMMA = "poisson", "gamma"


@dataclass
class RequestOptions:
    """How requests come in; conf/config.yaml says what the values mean."""

    arrivals: str = "closed"
    rate_per_s: float | None = None
    cv: float | None = None
    per_round: int | None = None
    output_tokens: int = 1
    rate_step: float | None = None
    max_rates: int = 10

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
        if self.output_tokens < 1:
            raise ValueError(f"requests.output_tokens: {self.output_tokens}, must be at least 1")
        if self.output_tokens > 1 and not self.open_loop:
            raise ValueError(
                f"requests.output_tokens: {self.output_tokens}, must be 1 with requests.arrivals=closed; "
                "decode_tokens= measures a decode phase without arrivals"
            )
        self._validate_cv()
        self._validate_sweep()
        if self._drawn:
            if self.rate_per_s is None or not 0 < self.rate_per_s < math.inf:
                raise ValueError(
                    f"requests.rate_per_s: {self.rate_per_s}, must be above 0 with arrivals={self.arrivals}"
                )
            return
        if self.rate_per_s is not None:
            raise ValueError(
                f"requests.rate_per_s: {self.rate_per_s}, must be null without requests.arrivals=poisson or gamma"
            )
        if self.open_loop:
            times = self._recorded()
            if self.per_round is not None and self.per_round > len(times):
                raise ValueError(
                    f"requests.per_round: {self.per_round}, must be at most {len(times)}, the times in {self.arrivals}"
                )
        elif self.per_round is not None:
            raise ValueError(f"requests.per_round: {self.per_round}, must be null with requests.arrivals=closed")

    def _validate_cv(self) -> None:
        if self.arrivals != GAMMA and self.cv is not None:
            raise ValueError(f"requests.cv: {self.cv}, must be null without requests.arrivals=gamma")
        if self.arrivals == GAMMA and (self.cv is None or not 0 < self.cv < math.inf):
            raise ValueError(f"requests.cv: {self.cv}, must be above 0 with arrivals=gamma: 1 is poisson, 2 bursts")

    def _validate_sweep(self) -> None:
        if self.max_rates < 1:
            raise ValueError(f"requests.max_rates: {self.max_rates}, must be at least 1")
        if self.rate_step is None:
            return
        if not self._drawn:
            raise ValueError(
                f"requests.rate_step: {self.rate_step}, must be null without requests.arrivals=poisson or gamma"
            )
        if not 1 < self.rate_step < math.inf:
            raise ValueError(f"requests.rate_step: {self.rate_step}, must be above 1, or null for one rate")

    def rates(self) -> list[float]:
        """Return the rates to measure in requests per second, ascending; 0 where times are recorded."""
        if self.rate_per_s is None:
            return [0.0]
        number, step = (1, 1.0) if self.rate_step is None else (self.max_rates, self.rate_step)
        return [self.rate_per_s * step**index for index in range(number)]

    def times(self, seed: int, round_index: int, default: int, rate_per_s: float | None = None) -> FloatArray:
        """Return float64 ``[num_requests]``, seconds from the start of a round, ascending; the same for all systems.

        Another rate has the same times, only closer together or further apart.

        Args:
            seed: of the run.
            round_index: random times differ from round to round, recorded ones do not.
            default: number of requests where the options say none.
            rate_per_s: of random times; None: the first.
        """
        if not self._drawn:
            return self._recorded()[: self.per_round]
        rng, number = np.random.default_rng([seed, round_index]), self.per_round or default
        mean_s = 1 / float(rate_per_s or self.rate_per_s or 1)
        if self.arrivals == POISSON:
            gaps = rng.exponential(mean_s, number)
        else:
            variance = float(self.cv or 1) ** 2
            gaps = rng.gamma(1 / variance, mean_s * variance, number)
        times: FloatArray = np.cumsum(gaps)
        return times

    def fingerprint(self) -> str:
        """Digest the recorded times; empty where there are none."""
        path = Path(self.arrivals)
        if not self.open_loop or self._drawn or not path.is_file():
            return ""
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    @property
    def _drawn(self) -> bool:
        return self.arrivals in (POISSON, GAMMA)

    def _recorded(self) -> FloatArray:
        path = Path(self.arrivals)
        if not path.is_file():
            raise ValueError(
                f"requests.arrivals: {self.arrivals!r}, must be closed, poisson, gamma or a file with one "
                "time in s per line"
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
