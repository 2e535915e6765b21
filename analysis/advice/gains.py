"""What every system gains over static expert parallelism, with the price of its rebalancing spread over passes.

A run replays recorded batches, one forward pass of each. Where passes of its size have fewer tokens than a recorded
batch, the batch stands for several of them, of which only the first has to wait for the weights of new placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.data.load import Run
from analysis.data.stats import ratio_of_sums
from results_schema.advising import COLD_ROUNDS, STATIC

FloatArray = npt.NDArray[np.float64]
#: A wait for new placements counts as a rebalance from this share of the median latency on.
_NOTICEABLE = 0.02


@dataclass(frozen=True)
class Gain:
    """What one system does in one run.

    Attributes:
        system: its name.
        policy: name of its policy; settings of one have the same.
        gain: time that static expert parallelism takes to its own, over all rounds but the first.
        low, high: ends of its bootstrap 95 % interval over rounds.
        latency_s: mean of a pass, its share of rebalances included.
        rebalance_s: what one rebalance makes a pass wait, median; 0 where there is none.
        rebalance_bytes: weights that it moves, median over rebalances and sum over ranks.
        rebalances: share of rounds with one.
        saved_s: what a pass without a rebalance takes less than static expert parallelism's, mean.
        device_expert_bytes: weights of experts in the memory of a device.
    """

    system: str
    policy: str
    gain: float
    low: float
    high: float
    latency_s: float
    rebalance_s: float
    rebalance_bytes: float
    rebalances: float
    saved_s: float
    device_expert_bytes: int

    @property
    def passes_to_pay(self) -> float | None:
        """Passes after which a rebalance has paid; None: it never does, or there is none."""
        return self.rebalance_s / self.saved_s if self.rebalance_s > 0 and self.saved_s > 0 else None


def gains_of(run: Run) -> list[Gain]:
    """Compare every exact system of a run that is no bound with static expert parallelism, which comes first.

    What is static expert parallelism under another name is left out.

    Raises:
        ValueError: static expert parallelism, or a second round, is missing.
    """
    latency = run.iterations.pivot(index="round", columns="system", values="latency_s")
    if STATIC not in latency or len(latency) <= COLD_ROUNDS:
        raise ValueError(f"{run.folder}: advice needs {STATIC} and at least {COLD_ROUNDS + 1} rounds")
    passes = passes_per_batch(run)
    warm = latency.index[COLD_ROUNDS:]
    static_s = latency.loc[warm, STATIC].to_numpy()
    names = [n for n, kind in run.systems.items() if kind["exact"] and not kind["bound"] and n in latency]
    names = [n for n in names if not is_static_again(run, n)]
    found = []
    for name in sorted(names, key=lambda n: n != STATIC):
        seen_s, wait_s = latency.loc[warm, name].to_numpy(), rebalance_s(run, name)[COLD_ROUNDS:]
        own_s = seen_s - wait_s * (1 - 1 / passes)
        gain, low, high = ratio_of_sums(static_s, own_s)
        rounds = wait_s > 0
        kind = run.systems[name]
        found.append(
            Gain(
                system=name,
                policy=str(kind.get("policy", name)),
                gain=gain,
                low=low,
                high=high,
                latency_s=float(own_s.mean()),
                rebalance_s=float(np.median(wait_s[rounds])) if rounds.any() else 0.0,
                rebalance_bytes=_moved_bytes(run, name, warm[rounds].tolist()),
                rebalances=float(rounds.mean()),
                saved_s=float((static_s - (seen_s - wait_s)).mean()),
                device_expert_bytes=int(kind.get("device_expert_bytes") or 0),
            )
        )
    return found


def is_static_again(run: Run, name: str) -> bool:
    """Tell whether a system is static expert parallelism under another name."""
    behaviour = run.systems[name].get("behaviour")
    return name != STATIC and behaviour is not None and behaviour == run.systems[STATIC].get("behaviour")


def passes_per_batch(run: Run) -> float:
    """Return how many passes of the run's size a recorded batch stands for; 1 where that is not known."""
    recorded = (run.manifest.get("dataset") or {}).get("recorded_tokens")
    return max(1.0, recorded / float(run.iterations["input_tokens"].median())) if recorded else 1.0


def rebalance_s(run: Run, system: str) -> FloatArray:
    """Return float64 ``[num_rounds]``, how long every round waited for weights of new placements.

    A system that sees no batch but earlier ones waits for no other weights; of one that plans by the batch itself, what
    it waits above its median is the wait. Waits too short to matter count as none.
    """
    knows = set(run.systems[system].get("knows") or ())
    rows = run.layers[run.layers["system"] == system]
    wait_s = rows.groupby(["round", "layer"])["fetch_wait_s"].max().unstack("layer").sort_index().to_numpy()
    if "history" not in knows:
        return np.zeros(len(wait_s))
    usual = 0.0 if knows == {"history"} else np.median(wait_s, axis=0)
    extra_s: FloatArray = np.maximum(wait_s - usual, 0.0).sum(axis=1)
    least = _NOTICEABLE * float(run.iterations.loc[run.iterations["system"] == system, "latency_s"].median())
    return np.where(extra_s >= least, extra_s, 0.0)


def _moved_bytes(run: Run, system: str, rounds: Sequence[int]) -> float:
    rows = run.layers[(run.layers["system"] == system) & run.layers["round"].isin(rounds)]
    return float(rows.groupby("round")["fetch_bytes"].sum().median()) if len(rows) else 0.0
