"""Up to which rate of requests every system keeps limits on latency, and which system that makes the one to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis.advice.gains import is_static_again
from analysis.data.load import Run
from analysis.data.serving import limits_of, max_rates, open_loop, rates_of, share_of
from results_schema.advising import STATIC


@dataclass(frozen=True)
class Rated:
    """What one system keeps up with in one run.

    Attributes:
        system: its name.
        policy: name of its policy; settings of one have the same.
        rate: highest rate in requests/s up to which enough requests keep the limits at every measured rate; 0: none.
        certain: the same if all that the system does takes longer by the margin.
        next_rate: the first rate at which too few keep them; None: at all measured ones enough do.
        failing: share of the requests that miss a limit there, by limit.
    """

    system: str
    policy: str
    rate: float
    certain: float
    next_rate: float | None
    failing: Mapping[str, float]


@dataclass(frozen=True)
class RateVerdict:
    """What to use for one case.

    Attributes:
        what_if: what is different from what was recorded and described.
        static: static expert parallelism.
        others: of every other policy the best setting, the highest rate first.
        rates: all that were measured, ascending.
    """

    what_if: str
    static: Rated
    others: Sequence[Rated]
    rates: Sequence[float]

    @property
    def paying(self) -> list[Rated]:
        """Systems that certainly keep the limits at a higher rate than static expert parallelism does."""
        return [one for one in self.others if one.certain > self.static.rate]

    @property
    def best(self) -> Rated | None:
        """The system to use; None: none is certainly better than static expert parallelism."""
        return self.paying[0] if self.paying else None

    @property
    def equals(self) -> list[Rated]:
        """Further systems that pay, and are not certainly behind the best."""
        return [one for one in self.paying[1:] if one.rate >= self.paying[0].certain]

    def differs(self, other: RateVerdict) -> bool:
        """Tell whether another verdict is not to use what this one uses, nor what is as good."""
        if self.best is None or other.best is None:
            return self.best is not other.best
        return self.best.policy not in {one.policy for one in [other.best, *other.equals]}


def rate_verdict(run: Run, what_if: str, margin: float) -> RateVerdict:
    """Judge one run with an open loop and limits.

    Args:
        run: of the sweep.
        what_if: its value of that option.
        margin: by what share times may be off.

    Raises:
        ValueError: static expert parallelism is missing.
    """
    exact = {n for n, kind in run.systems.items() if kind["exact"] and not kind["bound"]}
    frame = rates_of(run)
    frame = frame[frame["system"].isin([name for name in exact if not is_static_again(run, name)])]
    if STATIC not in set(frame["system"]):
        raise ValueError(f"{run.folder}: advice needs {STATIC}")
    kept, certain = max_rates(frame, share_of(run)), _certain_rates(run, margin)
    found = [_rated(run, frame, str(name), kept[str(name)], certain[str(name)]) for name in frame["system"].unique()]
    best: dict[str, Rated] = {}
    for one in sorted(found, key=lambda one: (-one.rate, -one.certain, sum(one.failing.values()))):
        if one.system != STATIC:
            best.setdefault(one.policy, one)
    static = next(one for one in found if one.system == STATIC)
    return RateVerdict(what_if, static, list(best.values()), sorted(frame["rate_per_s"].unique()))


def _certain_rates(run: Run, margin: float) -> dict[str, float]:
    """Return, by system, up to which rate it keeps the limits if all that it does takes ``1 + margin`` as long.

    A queue in which everything takes f times as long is the same queue with a clock that runs f times as slow: at rate
    r it keeps a limit if the queue as measured keeps 1 / f of the limit at rate f r.
    """
    slower = 1 + margin
    limits = {name: limit / slower for name, limit in limits_of(run).items()}
    tight = replace(run, config=run.config | {"slo": limits | {"share": share_of(run)}})
    return {name: rate / slower for name, rate in max_rates(rates_of(tight), share_of(run)).items()}


def _rated(run: Run, frame: pd.DataFrame, system: str, rate: float, certain: float) -> Rated:
    rows = frame[frame["system"] == system].sort_values("rate_per_s")
    beyond = rows[rows["rate_per_s"] > rate]
    next_rate = None if beyond.empty else float(beyond["rate_per_s"].iloc[0])
    return Rated(
        system=system,
        policy=str(run.systems[system].get("policy", system)),
        rate=rate,
        certain=certain,
        next_rate=next_rate,
        failing={} if next_rate is None else _failing(run, system, next_rate),
    )


def _failing(run: Run, system: str, rate: float) -> dict[str, float]:
    """Return by limit which share of a system's requests misses it at a rate."""
    rows = open_loop(run)
    rows = rows[(rows["system"] == system) & (rows["rate_per_s"] == rate)]
    return {name: float((rows[name] > limit).mean()) for name, limit in limits_of(run).items()}
