"""Small files of every format, written from its description, of routing that is known."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from harmoeny.placement import IntArray

BATCHES, LAYERS, RANKS, TOKENS, EXPERTS, TOP_K = 3, 2, 2, 40, 6, 2
#: By batch, layer and rank, the experts of every token.
Choices = list[list[list[IntArray]]]


def choices(seed: int = 0) -> Choices:
    """Draw the experts of every token, different ones for each."""
    rng = np.random.default_rng(seed)
    return [
        [
            [rng.random((TOKENS, EXPERTS)).argsort(axis=1)[:, :TOP_K].astype(np.int64) for _ in range(RANKS)]
            for _ in range(LAYERS)
        ]
        for _ in range(BATCHES)
    ]


def counts_of(chosen: Choices) -> IntArray:
    """Count by hand, int64 ``[batches, layers, ranks, experts]``."""
    counts = np.zeros((len(chosen), LAYERS, RANKS, EXPERTS), dtype=np.int64)
    for cell in np.ndindex(*counts.shape[:3]):
        for token in chosen[cell[0]][cell[1]][cell[2]]:
            for expert in token:
                counts[(*cell, expert)] += 1
    return counts


def sglang_stat(folder: Path, chosen: Choices) -> list[Path]:
    """``stat``: one file with all ranks' counts of every step, one of which is not filled; layer 0 is dense."""
    counts = counts_of(chosen).sum(axis=2)
    steps = np.zeros((BATCHES + 1, LAYERS + 1, EXPERTS), dtype=np.int32)
    steps[:BATCHES, 1:] = counts
    path = folder / "expert_distribution_recorder_1.pt"
    content = {"rank": 0, "logical_count": torch.tensor(steps), "average_utilization_rate_over_window": None}
    torch.save(content, path)
    return [path]


#: Physical experts of both layers: the last two are copies of 0 and 3, and layers differ in their order.
PHYSICAL = [[0, 1, 2, 3, 4, 5, 0, 3], [5, 4, 3, 2, 1, 0, 0, 3]]


def sglang_passes(folder: Path, chosen: Choices) -> list[Path]:
    """``per_pass``: a file per rank with the counts of its tokens by physical expert; copies take turns."""
    paths = []
    for rank in range(RANKS):
        records = [
            {
                "forward_pass_id": 100 + batch,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(physical(counts_of(chosen)[batch, :, rank])),
            }
            for batch in range(BATCHES)
        ]
        paths.append(folder / f"expert_distribution_recorder_1_{rank}.pt")
        torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(PHYSICAL)}, paths[-1])
    return paths


def physical(counts: IntArray) -> IntArray:
    """Deal the assignments of every expert out to its copies in turn, int64 ``[..., layers, 8]``."""
    dealt = np.zeros((*counts.shape[:-1], len(PHYSICAL[0])), dtype=np.int64)
    for layer, experts in enumerate(PHYSICAL):
        for expert in range(EXPERTS):
            copies = [column for column, of in enumerate(experts) if of == expert]
            for turn, column in enumerate(copies):
                n = counts[..., layer, expert]
                dealt[..., layer, column] = n // len(copies) + (turn < n % len(copies))
    return dealt


def vllm_array(folder: Path, chosen: Choices) -> list[Path]:
    """The window as an array of NumPy."""
    np.save(folder / "window.npy", counts_of(chosen).sum(axis=2).astype(np.int32))
    return [folder / "window.npy"]


def vllm_state(folder: Path, chosen: Choices) -> list[Path]:
    """The window by physical expert, with the map."""
    window = torch.tensor(physical(counts_of(chosen).sum(axis=2)))
    torch.save({"expert_load_window": window, "physical_to_logical_map": torch.tensor(PHYSICAL)}, folder / "window.pt")
    return [folder / "window.pt"]


def vllm_history(folder: Path, chosen: Choices) -> list[Path]:
    """The public JSON."""
    history = [{"logical_expert_load": load} for load in counts_of(chosen).sum(axis=2).tolist()]
    (folder / "expert-load.json").write_text(json.dumps({"note": "x", "load_history": history}, indent=1))
    return [folder / "expert-load.json"]


def megatron(folder: Path, chosen: Choices) -> list[Path]:
    """A file per rank, a line per step and layer; the second layer is one of multi-token prediction."""
    paths = []
    for rank in range(RANKS):
        lines = [
            {
                "step": batch,
                "stage": "pre_dispatch",
                "block": "mtp" if layer else "decoder",
                "layer": 3,
                "rank": rank,
                "num_tokens": TOKENS,
                "topk": TOP_K,
                "top_indices": chosen[batch][layer][rank].tolist(),
            }
            | ({"mtp_idx": 0} if layer else {})
            for batch in range(BATCHES)
            for layer in range(LAYERS)
        ]
        paths.append(folder / f"router_trace_rank{rank}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def mindspeed(folder: Path, chosen: Choices) -> list[Path]:
    """One file of the whole run."""
    total = counts_of(chosen).sum(axis=(0, 2))
    table = {str(layer): {str(e): int(n) for e, n in enumerate(row)} for layer, row in enumerate(total)}
    (folder / "token_collects_all.json").write_text(json.dumps(table, indent=2))
    return [folder / "token_collects_all.json"]


def olmoe(folder: Path, chosen: Choices) -> list[Path]:
    """One file per domain, here per batch, with NumPy's numbers as keys."""
    paths = []
    for number, batch in enumerate(chosen):
        counters = [Counter(np.concatenate(ranks).flatten()) for ranks in batch]
        paths.append(folder / f"domain{number}.pkl")
        paths[-1].write_bytes(pickle.dumps(counters))
    return paths


def requests(folder: Path, chosen: Choices) -> list[Path]:
    """A request per rank: its prompt are the tokens of the first batch, decoded are those of the others, one by one."""
    paths = []
    for rank in range(RANKS):
        prompt = {"0": None, **{str(layer + 1): chosen[0][layer][rank].tolist() for layer in range(LAYERS)}}
        decoded = [
            {"0": None, **{str(layer + 1): [chosen[batch][layer][rank][token].tolist()] for layer in range(LAYERS)}}
            for batch in range(1, BATCHES)
            for token in range(TOKENS - 5 * rank)
        ]
        paths.append(folder / f"{1096 + rank}.json")
        paths[-1].write_text(json.dumps([prompt, *decoded]))
    return paths


#: What they hold of a batch of all ranks' counts: all of it by batch, or only the sum over batches.
BY_BATCH: dict[str, tuple[str, Callable[[Path, Choices], list[Path]]]] = {
    "sglang stat": ("sglang", sglang_stat),
    "sglang per_pass": ("sglang", sglang_passes),
    "vllm array": ("vllm", vllm_array),
    "vllm state": ("vllm", vllm_state),
    "vllm history": ("vllm", vllm_history),
    "megatron": ("megatron", megatron),
    "olmoe": ("olmoe", olmoe),
}
