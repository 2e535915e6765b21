"""Lets policies that learn see the routing of batches that are never measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from experiments.measure.batch import make_batch
from experiments.point.point import Point
from experiments.results.gather import on_rank_0
from experiments.routers.base import CALIBRATION_BATCH
from experiments.text.tokens import TokenFile
from harmoeny.models.base import MoEModel
from harmoeny.policy import Policy
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.trace import RoutingTrace


def fit(policy: Policy, point: Point, model: MoEModel, tokens: TokenFile, comm: Communicator) -> Policy:
    """Show a policy the routing of its calibration batches; fitted on rank 0, so that all ranks have the same.

    Raises:
        OSError: on every rank, when the policy cannot be fitted.
        ValueError: likewise.
    """
    if policy.calibration_batches == 0:
        return policy
    batches = [
        make_batch(point, model, tokens, CALIBRATION_BATCH + i, comm.rank, comm.device).expert_ids
        for i in range(policy.calibration_batches)
    ]
    own = [torch.cat([batch[layer] for batch in batches]).cpu().numpy() for layer in range(len(model.experts))]
    everyone = on_rank_0(own, comm)
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
