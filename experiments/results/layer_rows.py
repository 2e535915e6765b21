"""From what the ranks saw to the rows of the result schema (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from harmoeny.placement import IntArray
from harmoeny.runtime.layer.recorder import PHASES, LayerTimes
from results_schema.rates import throughput_tokens_per_s


@dataclass(frozen=True)
class RankIteration:
    """One measured forward pass as one rank saw it; times are seconds on the common clock.

    Attributes:
        system: the system that executed it.
        round: round of interleaved systems.
        iteration: running number over all systems.
        rank: the rank.
        start_s: when it left the barrier.
        end_s: when it had its first output token.
        drain_s: how much later the last restore of a resident expert was complete.
        num_sequences: its sequences.
        input_tokens: its input tokens.
        layers: one dict of result columns per MoE layer, with ``compute_end_s`` in place of ``idle_s``.
    """

    system: str
    round: int
    iteration: int
    rank: int
    start_s: float
    end_s: float
    drain_s: float
    num_sequences: int
    input_tokens: int
    layers: list[dict[str, Any]]

    @property
    def restoring_s(self) -> float:
        """How long its host's link was busy with copying residents back."""
        return float(sum(layer["restore_s"] for layer in self.layers))


def layer_row(times: LayerTimes, rank: int, origin_s: float) -> dict[str, Any]:
    """Return the result columns of one layer on one rank."""
    marks = times.marks
    assert marks.plan is not None, "the layer was not executed to its end"
    tokens, early = marks.plan.tokens, marks.plan.early
    early_by_expert = np.zeros(tokens.shape[1], dtype=np.int64) if early is None else early[rank]
    planned = int(tokens[rank].sum())
    executed_by_expert = tokens[:, :, rank].sum(axis=0) + early_by_expert
    return {
        "layer": marks.layer,
        "rank": rank,
        "num_assignments": marks.num_assignments,
        "executed_tokens": int(executed_by_expert.sum()),
        "sent_tokens": planned - int(tokens[rank, :, rank].sum()),
        "dropped_tokens": marks.num_assignments - planned - int(early_by_expert.sum()),
        "padded_tokens": marks.padded_tokens,
        "num_active_experts": int((executed_by_expert > 0).sum()),
        "num_host_fetches": marks.fetch.num_host_fetches,
        "num_peer_fetches": marks.fetch.num_peer_fetches,
        "num_restores": len(marks.fetch.restores),
        "num_halved_fetches": marks.fetch.num_halved_fetches,
        "num_ahead": marks.fetch.num_ahead,
        "num_ahead_used": marks.fetch.num_ahead_used,
        "fetch_bytes": marks.fetch.fetch_bytes,
        "fetch_s": times.fetch_s,
        "fetch_wait_s": times.fetch_wait_s,
        "restore_s": times.restore_s,
        "restore_wait_s": times.restore_wait_s,
        **{f"{phase.name.lower()}_s": times.phase_s(phase) for phase in PHASES},
        "layer_s": times.boundary_s[-1] - times.boundary_s[0],
        "predicted_s": marks.plan.predicted_s or 0.0,
        "host_tokens": marks.host.num_tokens,
        "activation_bytes": marks.host.activation_bytes,
        "num_misses": marks.fetch.num_misses,
        "host_s": times.host_s,
        "host_wait_s": times.host_wait_s,
        "compute_end_s": origin_s + times.compute_end_s,
    }


@dataclass(frozen=True)
class Platform:
    """What numbers were measured on; every row carries it.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        device: name of the processor or GPU.
        host_link: what brought experts from host memory: ``memcpy``, ``emulated`` or ``cuda``.
    """

    backend: str
    device: str
    host_link: str


def layer_frame(iterations: list[RankIteration], platform: Platform) -> pd.DataFrame:
    """Return the rows of ``layers.parquet``; idle time needs all ranks, so it is added here."""
    rows = [
        {"system": it.system, "round": it.round, "iteration": it.iteration, **layer}
        for it in iterations
        for layer in it.layers
    ]
    frame = pd.DataFrame(rows)
    last_end = frame.groupby(["iteration", "layer"])["compute_end_s"].transform("max")
    frame["idle_s"] = last_end - frame["compute_end_s"]
    frame = frame.drop(columns="compute_end_s").assign(**asdict(platform))
    return frame.sort_values(["iteration", "layer", "rank"], ignore_index=True)


def iteration_frame(iterations: list[RankIteration], platform: Platform, scope: str) -> pd.DataFrame:
    """Return the rows of ``iterations.parquet``."""
    by_iteration: dict[int, list[RankIteration]] = {}
    for it in iterations:
        by_iteration.setdefault(it.iteration, []).append(it)
    rows = []
    for index, ranks in sorted(by_iteration.items()):
        begin = max(r.start_s for r in ranks)
        latency = max(r.end_s for r in ranks) - begin
        restoring = max(r.restoring_s for r in ranks)
        num_sequences = sum(r.num_sequences for r in ranks)
        input_tokens = sum(r.input_tokens for r in ranks)
        rows.append(
            {
                "system": ranks[0].system,
                "round": ranks[0].round,
                "iteration": index,
                "scope": scope,
                **asdict(platform),
                "world_size": len(ranks),
                "num_sequences": num_sequences,
                "input_tokens": input_tokens,
                "latency_s": latency,
                "ttft_s": sum((r.end_s - begin) * r.num_sequences for r in ranks) / num_sequences,
                "throughput_tokens_per_s": throughput_tokens_per_s(input_tokens, latency, restoring),
                "drain_s": max(r.drain_s for r in ranks),
            }
        )
    return pd.DataFrame(rows)


def expert_counts(expert_ids: Sequence[IntArray], num_experts: int) -> IntArray:
    """Count the assignments of every expert in every layer of a batch.

    Args:
        expert_ids: int64 ``[num_tokens, top_k]`` per MoE layer; a negative one is an assignment that is left out.
        num_experts: experts per layer.

    Returns:
        int64 ``[num_layers, num_experts]``.
    """
    return np.stack([np.bincount(ids[ids >= 0], minlength=num_experts) for ids in expert_ids]).astype(np.int64)


def routing_frame(batches: Sequence[IntArray], stacks: Sequence[int]) -> pd.DataFrame:
    """Return the rows of ``routing.parquet``.

    Args:
        batches: int64 ``[num_layers, num_experts]`` per round, assignments over all ranks.
        stacks: per MoE layer, the stack that it belongs to.
    """
    return pd.DataFrame(
        [
            {"round": round_index, "layer": layer, "stack": stack, "counts": counts[layer]}
            for round_index, counts in enumerate(batches)
            for layer, stack in enumerate(stacks)
        ]
    )
