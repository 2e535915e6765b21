"""Records the routing of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from experiments.point.point import Point
from experiments.results.gather import on_rank_0
from experiments.routing.trace_files import make_trace, write_trace
from harmoeny.models.base import MoEModel
from harmoeny.runtime.exchange.comm import Communicator


def record_routing(point: Point, model: MoEModel, batches: Sequence[Sequence[Tensor]], comm: Communicator) -> None:
    """Write the routing of a run's batches, if the point asks for it; all ranks call it together, and rank 0 writes.

    Args:
        point: says where, and whether with token paths.
        model: what was routed.
        batches: int64 ``[num_tokens, top_k]`` per batch and MoE layer, this rank's.
        comm: the ranks.
    """
    options, names = point.options.trace, (point.model.name, point.dataset.name)
    if options.record is None:
        return
    everyone = on_rank_0([[ids.cpu().numpy() for ids in batch] for batch in batches], comm)
    if everyone:
        write_trace(
            make_trace(
                Path(options.record), everyone, model.num_experts, names, model.stacks,
                token_paths=options.token_paths,
            ),
            point.run_id,
        )  # fmt: skip
