"""The figures that the paper's authors published, as cases to simulate; read at run time from the reference folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.routers.base import FloatArray, RoutingRequest
from experiments.routers.paper_skew import PaperSkewRouter
from experiments.routing.authors_csv import read_published
from experiments.simulator.model_work import ModelWork
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.trace import RoutingTrace

WORLD_SIZE = 8
SEQ_LEN = 1024
#: Sequences per GPU that the authors ran at skew 0, 0.5 and 0.9; they differ because memory ran out.
SKEW_BATCH = {
    "harmoeny": (64, 64, 64), "static_ep": (64, 32, 18), "exflow": (64, 32, 18), "drop": (64, 64, 64),
    "even_split": (64, 64, 64), "fastmoe": (64, 32, 32), "fastermoe": (64, 32, 32), "deepspeed_moe": (32, 8, 2),
}  # fmt: skip
DATASET_BATCH = {"fastmoe": 48, "fastermoe": 48, "deepspeed_moe": 10}
SKEWS = (0.0, 0.5, 0.9)
_OUR_NAMES = {
    "harmony": "harmoeny", "deepspeed": "static_ep", "exflow": "exflow", "drop": "drop", "even_split": "even_split",
    "fastmoe": "fastmoe", "fastermoe": "fastermoe", "deepspeed-inference": "deepspeed_moe",
}  # fmt: skip
#: (file, column that names the system, column of the sweep)
_FILES = (
    ("throughput_switch128_systems_skew.csv", "system_name", "router_skew"),
    ("throughput_switch128_policy_skew.csv", "scheduling_policy", "router_skew"),
    ("throughput_switch128_systems_dataset.csv", "system_name", "dataset"),
    ("throughput_switch128_policy_datasets.csv", "scheduling_policy", "dataset"),
)


@dataclass(frozen=True)
class Published:
    """One published throughput.

    Attributes:
        system: our name of the system.
        case: its skew, or its data set.
        skew: the skew; None for a data set.
        batch_size: sequences per GPU.
        sequences_per_s: over all GPUs.
        calibration: whether constants were fitted on it.
    """

    system: str
    case: str
    skew: float | None
    batch_size: int
    sequences_per_s: float
    calibration: bool


@dataclass(frozen=True)
class Breakdown:
    """One published time breakdown: skew 0.9 over ten hot experts.

    Attributes:
        name: of its file.
        system: our name of the system.
        fetch: how it fetches.
        batch_size: sequences per GPU.
        threshold: HarMoEny's.
    """

    name: str
    system: str
    fetch: str
    batch_size: int = 48
    threshold: int = 1024


BREAKDOWNS = (
    Breakdown("no-sched", "static_ep", "async"),
    Breakdown("sync", "harmoeny", "sync"),
    Breakdown("async", "harmoeny", "async"),
)
_BREAKDOWN_COLUMNS = {"plan": "schedule latency (ms)", "compute": "comp latency (ms)", "layer": "latency (ms)"}


def throughputs(folder: Path) -> list[Published]:
    """Return all published throughputs of Switch-128, each once.

    Raises:
        OSError: the reference folder is not there.
    """
    found: dict[tuple[str, str], Published] = {}
    for name, system_column, case_column in _FILES:
        for row in pd.read_csv(folder / name).to_dict("records"):
            system, value = _OUR_NAMES[row[system_column]], row[case_column]
            is_skew = case_column == "router_skew"
            size = SKEW_BATCH[system][SKEWS.index(value)] if is_skew else DATASET_BATCH.get(system, 64)
            case = f"skew {value:g}" if is_skew else str(value)
            skew = float(value) if is_skew else None
            point = Published(system, case, skew, size, float(row["throughput (toks/s)"]), is_skew and value == 0)
            found.setdefault((system, case), point)
    return list(found.values())


def skew_counts(work: ModelWork, skew: float, num_batches: int) -> Iterator[list[IntArray]]:
    """Yield batches of the authors' synthetic routing, int64 ``[world_size, num_experts]`` per MoE layer."""
    router = PaperSkewRouter(skew=skew)
    for index in range(num_batches):
        requests = [
            RoutingRequest(
                num_tokens=num_tokens,
                num_experts=work.num_experts,
                top_k=1,
                batch=index,
                layer=layer,
                rank=0,
                seed=0,
                world_size=WORLD_SIZE,
            )
            for layer, num_tokens in enumerate(work.layer_tokens)
        ]
        yield [np.tile(router.count(request), (WORLD_SIZE, 1)) for request in requests]


def dataset_counts(folder: Path, dataset: str, work: ModelWork, num_batches: int) -> Iterator[list[IntArray]]:
    """Yield batches of the recorded routing of a data set, scaled to ``work``'s tokens and spread evenly over ranks."""
    for shares in _recorded_shares(folder, dataset)[:num_batches]:
        yield [spread(row, num_tokens) for row, num_tokens in zip(shares, work.layer_tokens, strict=True)]


def fake_trace(folder: Path, point: Published, work: ModelWork) -> RoutingTrace:
    """Return the token paths that the authors gave ExFlow: each layer's histogram sorted, so that no path is real."""
    if point.skew is not None:
        (counts,) = skew_counts(work, point.skew, 1)
    else:
        last = _recorded_shares(folder, point.case)[-1]
        counts = [spread(row, n) for row, n in zip(last, work.layer_tokens, strict=True)]
    experts = np.arange(work.num_experts)
    return RoutingTrace([np.repeat(experts, c[0])[:, None] for c in counts], work.stacks)


def breakdown_policy(policy: Policy, breakdown: Breakdown) -> Policy:
    """Return a policy with the options of a breakdown."""
    if isinstance(policy, TokenHarMoEny):
        return replace(policy, fetch=breakdown.fetch, threshold=breakdown.threshold)
    return replace(policy, fetch=breakdown.fetch)


def breakdown_counts(work: ModelWork) -> list[IntArray]:
    """Return the routing of the breakdowns: experts 0 to 9 share 90 % of the tokens, the others the rest."""
    shares = np.full(work.num_experts, 0.1 / (work.num_experts - 10))
    shares[:10] = 0.09
    return [spread(shares, num_tokens) for num_tokens in work.layer_tokens]


def breakdown_ms(folder: Path, breakdown: Breakdown, layers: Sequence[int]) -> dict[str, float]:
    """Return published times by phase, means over layers and ranks; ``compute`` of the rank that computes longest."""
    frame = pd.read_csv(folder / "timebreakdown" / f"switch128-harmony-{breakdown.name}.csv")
    frame = frame[frame["layer"].isin(layers)]
    means = {phase: float(frame[column].mean()) for phase, column in _BREAKDOWN_COLUMNS.items()}
    return means | {"compute": float(frame.groupby("layer")[_BREAKDOWN_COLUMNS["compute"]].max().mean())}


def spread(shares: FloatArray, num_tokens: int) -> IntArray:
    """Give every rank ``num_tokens`` tokens by ``shares`` (float64 ``[num_experts]``), rounded by largest remainder."""
    wanted = shares * num_tokens
    counts = np.floor(wanted).astype(np.int64)
    order = np.argsort(counts - wanted, kind="stable")
    counts[order[: num_tokens - int(counts.sum())]] += 1
    return np.tile(counts, (WORLD_SIZE, 1))


@lru_cache(maxsize=4)
def _recorded_shares(folder: Path, dataset: str) -> list[FloatArray]:
    """Return float64 ``[num_moe_layers, num_experts]`` per recorded batch, the experts' shares."""
    counts = read_published(folder / "expert_freq_switch128_datasets.csv", dataset).counts.sum(axis=2)
    return list(counts / counts.sum(axis=2, keepdims=True))
