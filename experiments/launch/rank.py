"""One rank of one point, from the process group to the result files."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from experiments.console import PointProgress
from experiments.launch.environment import num_threads
from experiments.measure.batch import make_batch
from experiments.measure.check import check_system
from experiments.measure.clock import clock_offset_s
from experiments.measure.extra_loops import measure_phases, num_steps
from experiments.measure.record_routing import record_routing
from experiments.measure.rounds import run_rounds
from experiments.point.point import Point
from experiments.results.gather import on_rank_0
from experiments.results.layer_rows import (
    Platform,
    expert_counts,
    iteration_frame,
    layer_frame,
    routing_frame,
)
from experiments.results.manifest import device_name, model_fields, options_of
from experiments.results.request_rows import decode_frame, request_frame
from experiments.results.run_folder import RunFolder
from experiments.routers.base import CALIBRATION_BATCH
from experiments.text.tokens import TokenFile
from harmoeny.models.base import MoEModel
from harmoeny.policy import Policy
from harmoeny.runtime.device import Device, choose_device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.sharing import share_model
from harmoeny.runtime.start import start_rank
from harmoeny.trace import RoutingTrace

#: How long a rank that lost a peer waits before it reports that, so that the launcher sees the peer's own end first.
_PEER_LOST_DELAY_S = 1.5


def join(point: Point) -> torch.device:
    """Set this process up as a rank: threads, device and, for several ranks, the process group (once per process)."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", point.options.world_size))
    device = choose_device(point.device_type, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(num_threads(local_world_size))
    if point.options.world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            Device.of(device).process_group,
            rank=rank,
            world_size=point.options.world_size,
            timeout=timedelta(seconds=point.options.timeout_s),
        )
    return device


def run_rank(point: Point, tokens: TokenFile, folder: RunFolder) -> None:
    """Measure a point as one of its ranks; rank 0 writes the results.

    Raises:
        CheckError: a system's output is not the dense model's.
    """
    device = join(point)
    try:
        with torch.inference_mode():
            _run(point, tokens, folder, device)
    except (dist.DistError, RuntimeError) as error:
        if point.options.world_size > 1 and is_peer_lost(error):
            time.sleep(_PEER_LOST_DELAY_S)
        raise


def is_peer_lost(error: BaseException) -> bool:
    """Tell whether an error says that another rank is gone or cannot be reached, rather than that this one failed."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed by peer", "connection reset", "gloo", "nccl"))


def _run(point: Point, tokens: TokenFile, folder: RunFolder, device: torch.device) -> None:
    comm = Communicator(device)
    environment = _environment(point, comm, tokens)
    if comm.rank == 0:
        folder.describe(environment)

    total = len(point.systems) * (point.options.rounds + point.options.warmup_rounds + 1) + num_steps(point)
    with PointProgress(point.run_id, total, enabled=comm.rank == 0) as progress:
        progress.step("building the model")
        model = build_model(point, comm)
        engine = start_rank(model.experts, comm, point.hardware)
        cost = engine.memory.cost
        model.connect(engine)

        progress.step("preparing the systems")
        batches = [make_batch(point, model, tokens, i, comm.rank, device) for i in range(point.options.rounds)]
        systems = [
            engine.build_system(name, _fit(policy.calibrated(cost), point, model, tokens, comm))
            for name, policy in point.systems.items()
        ]
        checks = {}
        for system in systems:
            progress.step(f"checking {system.name}")
            checks[system.name] = vars(check_system(model, engine, system, batches[0].input_ids, batches[0].expert_ids))
            progress.advance()
        offset_s = clock_offset_s(comm)
        iterations = run_rounds(
            model,
            engine,
            systems,
            batches,
            warmup_rounds=point.options.warmup_rounds,
            clock_offset_s=offset_s,
            progress=progress,
        )
        extra = measure_phases(point, model, engine, systems, batches, offset_s, progress)
        for name, more in extra.checks.items():
            checks[name] = checks[name] | more
    fields = {
        "scope": model.scope,
        "model": model_fields(
            point,
            num_moe_layers=len(model.experts),
            num_experts=model.num_experts,
            top_k=model.top_k,
            expert_bytes=model.experts[0].expert_bytes,
            store_bytes=engine.memory.store.nbytes,
        ),
        "calibration": vars(cost),
        "checks": checks,
    }
    record_routing(point, model, [batch.expert_ids for batch in batches], comm)
    own = [expert_counts([ids.cpu().numpy() for ids in batch.expert_ids], model.num_experts) for batch in batches]
    routed = [np.sum(ranks, axis=0) for ranks in zip(*on_rank_0(own, comm), strict=True)]
    everyone = [it for rank in on_rank_0(iterations, comm) for it in rank]
    served = [request for rank in on_rank_0(extra.served, comm) for request in rank]
    decoded = [batch for rank in on_rank_0(extra.decoded, comm) for batch in rank]
    if comm.rank == 0:
        platform = Platform(environment["backend"], environment["device"], engine.memory.engine.link)
        folder.write_tables(
            {
                "layers": layer_frame(everyone, platform),
                "iterations": iteration_frame(everyone, platform, model.scope),
                "routing": routing_frame(routed, model.stacks),
                "requests": request_frame(everyone, served, platform),
                **({"decode": decode_frame(decoded, platform)} if decoded else {}),
            }
        )
        folder.describe(
            fields,
            {
                system.name: {
                    "options": options_of(point, system.name, system.policy),
                    "device_expert_bytes": system.fetcher.device_bytes,
                    "fit": system.policy.fit_report(),
                }
                for system in systems
            },
        )
        folder.finish()
    engine.close()
    comm.barrier()


def build_model(point: Point, comm: Communicator) -> MoEModel:
    """Build the model once per host and share its weights; all ranks call it together."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    model = point.model.build(point.options.seed, "cpu" if local_rank == 0 or comm.world_size == 1 else "meta")
    share_model(model, comm, local_rank)
    return model


def _fit(policy: Policy, point: Point, model: MoEModel, tokens: TokenFile, comm: Communicator) -> Policy:
    """Show a policy the routing of its calibration batches; fitted on rank 0, so that all ranks have the same."""
    if policy.calibration_batches == 0:
        return policy
    batches = [
        make_batch(point, model, tokens, CALIBRATION_BATCH + i, comm.rank, comm.device).expert_ids
        for i in range(policy.calibration_batches)
    ]
    own = [torch.cat([batch[layer] for batch in batches]).cpu().numpy() for layer in range(len(model.experts))]
    everyone: list[Any] = [own]
    if comm.world_size > 1:
        everyone = [None] * comm.world_size
        dist.all_gather_object(everyone, own)
    fitted: list[Any] = [None]
    if comm.rank == 0:
        trace = RoutingTrace([np.concatenate(layer) for layer in zip(*everyone, strict=True)], model.stacks)
        try:
            fitted = [policy.fitted(trace, model.num_experts, comm.world_size)]
        except (OSError, ValueError) as error:
            fitted = [error]  # the other ranks wait for an answer
    if comm.world_size > 1:
        dist.broadcast_object_list(fitted)
    if isinstance(fitted[0], Exception):
        raise fitted[0]
    result: Policy = fitted[0]
    return result


def _environment(point: Point, comm: Communicator, tokens: TokenFile) -> dict[str, Any]:
    fresh = tokens.fresh_batches(
        sequences_per_batch=point.options.world_size * point.options.batch_size, seq_len=point.options.seq_len
    )
    return {
        "backend": Device.of(comm.device).process_group,
        "device": device_name(comm.device),
        "threads_per_rank": torch.get_num_threads(),
        "dataset": {
            "name": point.dataset.name,
            "num_tokens": tokens.num_tokens,
            "sha256": tokens.sha256,
            "repeats_text": fresh < point.options.rounds,
        },
    }
