"""What the open loop says of serving: throughput, goodput, and percentiles by rate and system (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.data.load import Run
from analysis.data.stats import least_samples, percentile, ratio_of_sums
from results_schema.slo import LIMITS, keeps_limits

PERCENTILES = (50, 90, 95, 99)
#: What has percentiles; of the last, gaps of all requests count, and as many requests are needed.
MEASURES = ("ttft_s", "tpot_s", "e2e_s", "itl_s")
#: Share of the requests that must be good where a run's configuration says none.
_SHARE = 0.9


def limits_of(run: Run) -> dict[str, float]:
    """Return the limits that were asked for, in seconds by names of :data:`results_schema.slo.LIMITS`."""
    slo: Mapping[str, float | None] = run.config.get("slo") or {}
    return {name: limit for name in LIMITS if (limit := slo.get(name)) is not None}


def share_of(run: Run) -> float:
    """Return the share of requests that have to keep the limits."""
    return float((run.config.get("slo") or {}).get("share", _SHARE))


def open_loop(run: Run) -> pd.DataFrame:
    """Return the rows of the open loop with ``e2e_s``, and the rate also for runs of earlier revisions; maybe none."""
    if run.requests is None:
        return pd.DataFrame()
    rows = run.requests[run.requests["loop"] == "open"]
    asked = (run.config.get("requests") or {}).get("rate_per_s") or 0.0
    rate = rows["rate_per_s"].where(rows["rate_per_s"] > 0, asked)
    return rows.assign(rate_per_s=rate, e2e_s=rows["ttft_s"] + rows["decode_s"])


def rates_of(run: Run) -> pd.DataFrame:
    """Return one row per rate and system, ascending by rate; none where no open loop was measured.

    Throughput and goodput are requests over time, of all rounds, with intervals over rounds. Percentiles are over the
    requests of all rounds, and missing where these are too few for an interval.
    """
    rows, limits = open_loop(run), limits_of(run)
    if rows.empty:
        return pd.DataFrame()
    return pd.DataFrame(
        [
            {"rate_per_s": rate, "system": system, **_measures(own, limits)}
            for rate, of_rate in rows.groupby("rate_per_s")
            for system in run.systems
            if not (own := of_rate[of_rate["system"] == system]).empty
        ]
    )


def max_rates(frame: pd.DataFrame, share: float) -> dict[str, float]:
    """Return, by system, the highest rate up to which enough requests are good at every measured one; 0 for none.

    Args:
        frame: of :func:`rates_of`.
        share: of the requests that have to be good.
    """
    highest = {}
    for system, rows in frame.sort_values("rate_per_s").groupby("system", sort=False):
        kept = (rows["good_share"] >= share).cummin()
        highest[str(system)] = float(rows["rate_per_s"].where(kept, 0.0).max())
    return highest


def unsupported(frame: pd.DataFrame) -> list[int]:
    """Return the percentiles that some row has too few requests for."""
    fewest = frame["num_requests"].min()
    return [percent for percent in PERCENTILES if fewest < least_samples(percent)]


def _measures(rows: pd.DataFrame, limits: Mapping[str, float]) -> dict[str, Any]:
    """Return the columns of one system at one rate."""
    good = _good(rows, limits)
    by_round = rows.assign(good=good, end_s=rows["arrival_s"] + rows["e2e_s"]).groupby("round")
    duration_s = by_round["end_s"].max()
    values: dict[str, Any] = {"num_requests": len(rows), "num_rounds": len(duration_s)}
    values |= _spread("requests_per_s", ratio_of_sums(by_round.size(), duration_s))
    values |= _spread("output_tokens_per_s", ratio_of_sums(by_round["output_tokens"].sum(), duration_s))
    if limits:
        values |= {"good_share": good.mean()}
        values |= _spread("goodput_per_s", ratio_of_sums(by_round["good"].sum(), duration_s))
    values["queue_mean_s"] = rows["queue_s"].mean()
    several = rows["output_tokens"].max() > 1
    for name in MEASURES if several else MEASURES[:1]:
        samples = np.concatenate(list(rows["itl_s"])) if name == "itl_s" else rows[name].to_numpy()
        values |= _percentiles(name.removesuffix("_s"), samples, len(rows))
    return values


def _good(rows: pd.DataFrame, limits: Mapping[str, float]) -> npt.NDArray[np.bool_]:
    times = zip(rows["ttft_s"], rows["tpot_s"], rows["decode_s"], strict=True)
    return np.array(
        [keeps_limits(limits, ttft_s=ttft, tpot_s=tpot, decode_s=decode) for ttft, tpot, decode in times], dtype=bool
    )


def _percentiles(name: str, samples: npt.NDArray[np.float64], num_requests: int) -> dict[str, float]:
    """Return the mean and the percentiles; of gaps without intervals, since those of a request depend on each other."""
    values = {f"{name}_mean_s": float(samples.mean())}
    for percent in PERCENTILES:
        column = f"{name}_p{percent}_s"
        if len(samples) != num_requests:
            supported = num_requests >= least_samples(percent)
            values[column] = float(np.quantile(samples, percent / 100)) if supported else np.nan
        else:
            found = percentile(samples, percent)
            values |= _spread(column, (np.nan,) * 3 if found is None else (found.median, found.low, found.high))
    return values


def _spread(name: str, ends: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
