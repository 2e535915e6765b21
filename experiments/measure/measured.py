"""Brings what the ranks measured to rank 0, which writes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.console import say
from experiments.measure.batch import shared_text
from experiments.measure.bench import Bench
from experiments.measure.extra_loops import Extra
from experiments.measure.goal import Reached
from experiments.measure.records import Records
from experiments.point.options import GpuSharing
from experiments.point.point import Point
from experiments.results.gather import all_on_rank_0, on_rank_0
from experiments.results.layer_rows import (
    Platform,
    expert_counts,
    iteration_frame,
    layer_frame,
    routing_frame,
)
from experiments.results.manifest import model_fields, options_of
from experiments.results.request_rows import decode_frame, request_frame
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title
from experiments.results.yardstick_rows import yardstick_frame
from experiments.text.tokens import TokenFile
from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.system import System
from results_schema.tables import DECODE, ITERATIONS, LAYERS, REQUESTS, ROUTING, YARDSTICK, Table

FAILED_AND_LEFT_OUT = "failed its check and is left out"
#: Why a point has no numbers.
NONE_PASSED = "no system passed its check"


@dataclass(frozen=True)
class Measured:
    """What one rank measured.

    Attributes:
        checks: by system, the outcome of its check.
        rounds: the closed loop.
        reached: how its rounds ended; None without ``until``.
        extra: what was measured beside it.
    """

    checks: Mapping[str, dict[str, Any]]
    rounds: Records
    reached: Reached | None
    extra: Extra


def write_results(bench: Bench, measured: Measured, folder: RunFolder) -> None:
    """Write everything and finish the run; all ranks call it together, and rank 0 writes."""
    tables = _tables(bench, measured)
    if bench.comm.rank != 0:
        return
    lost = lost_in_rounds(tables[LAYERS], {system.name for system in bench.systems if system.policy.exact})
    for name, reason in lost.items():
        say(f"error: {point_title(bench.point.run_id)}: {name} {FAILED_AND_LEFT_OUT}: {reason}")
    measured = replace(measured, checks=_with_failed(measured.checks, lost))
    failed = failed_systems(measured.checks)
    if all(system.name in failed for system in bench.systems):
        folder.describe({"checks": dict(measured.checks), "failed_systems": failed})
        folder.fail(NONE_PASSED)
        return
    folder.write_tables({table: _without(frame, lost) for table, frame in tables.items()})
    notes = {system.name: _notes(bench.point, system) for system in bench.systems}
    folder.describe(_fields(bench, measured), notes, left_out=failed)
    folder.finish()


def lost_in_rounds(layers: pd.DataFrame, exact: Collection[str]) -> dict[str, str]:
    """Return the systems that must execute every assignment and did not in a measured round, with what is missing.

    The checks see one batch, which is not measured; a system may compute less on others, and would look fast.

    Args:
        layers: the rows of ``layers.parquet``.
        exact: systems that give the model's output.
    """
    rows = layers[layers["system"].isin(list(exact)) & (layers["dropped_tokens"] != 0)]
    return {
        str(name): f"{part['dropped_tokens'].abs().sum()} assignments of measured rounds were not executed, first in "
        f"round {part['round'].min()}"
        for name, part in rows.groupby("system")
    }


def _with_failed(checks: Mapping[str, dict[str, Any]], failed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {n: c | ({"passed": False, "reason": failed[n]} if n in failed else {}) for n, c in checks.items()}


def _without(frame: pd.DataFrame, systems: Collection[str]) -> pd.DataFrame:
    return frame[~frame["system"].isin(list(systems))] if "system" in frame else frame


def failed_systems(checks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the systems that failed their check, with the reason; they have no numbers."""
    return {name: check["reason"] for name, check in checks.items() if not check["passed"]}


def environment_fields(point: Point, comm: Communicator, tokens: TokenFile) -> dict[str, Any]:
    """Return what the manifest says of the ranks and the text, known before anything is measured."""
    options = point.options
    fresh = tokens.fresh_batches(sequences_per_batch=options.world_size * options.batch_size, seq_len=options.seq_len)
    device = Device.of(comm.device)
    return {
        "backend": comm.backend,
        "device": device_label(point, device.name),
        "threads_per_rank": torch.get_num_threads(),
        "dataset": {
            "name": point.dataset_name,
            "recorded_tokens": point.router.recorded_tokens(),
            "text": point.dataset.name,
            "num_tokens": tokens.num_tokens,
            "sha256": tokens.sha256,
            "repeats_text": fresh < point.most_rounds,
            "shared_text": shared_text(point, tokens),
        },
    }


_SHARES = {2: "half", 3: "a third", 4: "a quarter", 8: "an eighth"}


def device_label(point: Point, name: str) -> str:
    """Return the name of a rank's device, and what of it the rank has where several share one."""
    num_ranks = point.options.ranks_per_gpu
    if num_ranks == 1:
        return name
    if point.options.gpu_sharing == GpuSharing.TIME_SLICED:
        return f"{num_ranks} ranks on one {name}, which take turns (time_sliced)"
    return f"{num_ranks} ranks on one {name}, {_SHARES.get(num_ranks, f'1/{num_ranks}')} of its SMs each"


def _tables(bench: Bench, measured: Measured) -> dict[Table, pd.DataFrame]:
    """Gather all ranks' records and return the tables on rank 0, none on the others."""
    comm, model = bench.comm, bench.model
    routed = on_rank_0(_routed(bench), comm)
    iterations = all_on_rank_0(measured.rounds.iterations, comm)
    yardstick = all_on_rank_0(measured.rounds.yardstick, comm)
    served = all_on_rank_0(measured.extra.served, comm)
    decoded = all_on_rank_0(measured.extra.decoded, comm)
    if comm.rank != 0:
        return {}
    device = device_label(bench.point, Device.of(comm.device).name)
    platform = Platform(comm.backend, device, bench.engine.memory.transfers.link)
    tables = {
        LAYERS: layer_frame(iterations, platform),
        ITERATIONS: iteration_frame(iterations, platform, model.scope),
        ROUTING: routing_frame([np.sum(ranks, axis=0) for ranks in zip(*routed, strict=True)], model.stacks),
        REQUESTS: request_frame(iterations, served, platform),
        YARDSTICK: yardstick_frame(yardstick, platform),
    }
    return tables | ({DECODE: decode_frame(decoded, platform)} if decoded else {})


def _routed(bench: Bench) -> list[IntArray]:
    """Return int64 ``[num_layers, num_experts]`` per round, this rank's assignments."""
    return [
        expert_counts([ids.cpu().numpy() for ids in batch.expert_ids], bench.model.num_experts)
        for batch in bench.batches
    ]


def _fields(bench: Bench, measured: Measured) -> dict[str, Any]:
    """Return what the manifest says of the model and of what came out."""
    model, memory = bench.model, bench.engine.memory
    return {
        "scope": model.scope,
        "model": model_fields(
            bench.point,
            num_moe_layers=len(model.experts),
            num_experts=model.num_experts,
            top_k=model.top_k,
            expert_bytes=model.experts[0].expert_bytes,
            store_bytes=memory.store.nbytes,
        ),
        "exchange": {"used": str(bench.comm.exchange), "remark": bench.comm.remark},
        "calibration": memory.cost.numbers(),
        "yardstick": {
            "product_flops": bench.rig.yardstick.product_flops,
            "copy_bytes": bench.rig.yardstick.copy_bytes,
        },
        "inputs": bench.point.inputs(),
        "checks": dict(measured.checks),
        "failed_systems": failed_systems(measured.checks),
    } | ({} if measured.reached is None else {"until": asdict(measured.reached)})


def _notes(point: Point, system: System) -> dict[str, Any]:
    """Return what the manifest says of one system beside what was known before."""
    return {
        "options": options_of(point, system.name, system.policy),
        "device_expert_bytes": system.fetcher.device_bytes,
        "fit": system.policy.fit_report(),
        "kernel": system.executor.kernel,
    }
