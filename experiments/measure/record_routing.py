"""Records the routing of a run."""

from __future__ import annotations

from pathlib import Path

from experiments.measure.bench import Bench
from experiments.results.gather import on_rank_0
from experiments.routing.trace_files import make_trace, write_trace


def record_routing(bench: Bench) -> None:
    """Write the routing of the batches, if the point asks for it; all ranks call it together, and rank 0 writes."""
    point, model, options = bench.point, bench.model, bench.point.options.trace
    if options.record is None:
        return
    everyone = on_rank_0([[ids.cpu().numpy() for ids in batch.expert_ids] for batch in bench.batches], bench.comm)
    if everyone:
        names = point.model.name, point.dataset_name
        recorded = make_trace(
            Path(options.record), everyone, model.num_experts, names, model.stacks, token_paths=options.token_paths
        )
        write_trace(recorded, point.run_id)
