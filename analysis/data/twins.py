"""Systems that are one and the same under two names: how far apart they come out is a sweep's own error bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from analysis.data.load import Run
from analysis.data.pairing import run_ratio, throughput
from analysis.data.stats import Estimate


@dataclass(frozen=True)
class Twins:
    """Two systems that do the same.

    Attributes:
        one: a system.
        other: the other one.
        ratios: by run that has both, the throughput of the first to the second's.
    """

    one: str
    other: str
    ratios: Sequence[Estimate]

    @property
    def low(self) -> float:
        """Where the lowest interval ends."""
        return min(ratio.low for ratio in self.ratios)

    @property
    def high(self) -> float:
        """Where the highest interval ends."""
        return max(ratio.high for ratio in self.ratios)


def twins_of(runs: Sequence[Run]) -> list[Twins]:
    """Return all pairs of systems whose policies are the same code with the same options, as the manifests say."""
    ratios: dict[tuple[str, str], list[Estimate]] = {}
    for run in runs:
        for pair in () if run.simulated else _pairs(run):
            one, other = (throughput(run, system) for system in pair)
            ratios.setdefault(pair, []).append(run_ratio(run, one, other))
    return [Twins(*pair, found) for pair, found in ratios.items()]


def _pairs(run: Run) -> Iterator[tuple[str, str]]:
    behaviours = {name: kind.get("behaviour") for name, kind in run.systems.items()}
    for one, other in combinations(behaviours, 2):
        if behaviours[one] is not None and behaviours[one] == behaviours[other]:
            yield one, other
