"""Placements of experts in the files that serving engines read; docs/traces.md names the options that take them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harmoeny.placement import BoolArray
from results_schema.atomic import write_text


def slots_of(resident: BoolArray) -> list[list[int]]:
    """Return the experts of every rank in ascending order.

    Args:
        resident: bool ``[num_experts, world_size]``.

    Raises:
        ValueError: an expert is nowhere, or ranks hold different numbers: no engine can take that.
    """
    nowhere = np.flatnonzero(~resident.any(axis=1))
    if len(nowhere):
        raise ValueError(f"placement: expert {nowhere[0]} is on no rank")
    held = resident.sum(axis=0)
    if held.min() != held.max():
        raise ValueError(f"placement: ranks hold {held.min()} to {held.max()} experts, must all hold the same number")
    return [np.flatnonzero(resident[:, rank]).tolist() for rank in range(resident.shape[1])]


def sglang(layers: Sequence[BoolArray], first_layer: int) -> str:
    """Write what SGLang's ``--init-expert-location FILE.json`` takes: the expert in every slot, for every layer.

    Slots are numbered rank by rank; layers before the first one with experts have them in turn.

    Source: sgl-project/sglang, python/sglang/srt/eplb/expert_location.py (``physical_to_logical_map``).
    """
    rows = [[expert for rank in slots_of(resident) for expert in rank] for resident in layers]
    in_turn = [slot % layers[0].shape[0] for slot in range(len(rows[0]))]
    return json.dumps({"physical_to_logical_map": [*([in_turn] * first_layer), *rows]}) + "\n"


def tensorrt_llm(layers: Sequence[BoolArray], first_layer: int) -> str:
    """Write the file that TensorRT-LLM's ``moe_config.load_balancer`` names, of a placement that stays.

    Source: NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer/README.md (``initial_global_assignments``).
    """
    rows = [[expert for rank in slots_of(resident) for expert in rank] for resident in layers]
    content: dict[str, Any] = {
        "initial_global_assignments": {first_layer + layer: row for layer, row in enumerate(rows)},
        "num_slots": len(rows[0]),
        "layer_updates_per_iter": 0,
    }
    return yaml.safe_dump(content, default_flow_style=None, sort_keys=False, width=1_000_000)


def vllm_ascend(layers: Sequence[BoolArray], first_layer: int) -> str:
    """Write what vLLM Ascend's ``eplb_config.expert_map_path`` (and MindSpeed-RL's) names; vLLM itself takes no file.

    Source: Ascend/MindSpeed-RL, docs/features/EPLB.md; vLLM Ascend, user guide on EPLB.
    """
    table = [
        {
            "layer_id": first_layer + layer,
            "device_count": resident.shape[1],
            "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(slots_of(resident))
            ],
        }
        for layer, resident in enumerate(layers)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": table}) + "\n"


@dataclass(frozen=True)
class Engine:
    """A serving engine.

    Attributes:
        make: writes its file, of placements by layer and the number of the first layer with experts.
        suffix: what the file's name must end in.
        use: the engine's options that take the file, with ``{path}`` and ``{spare}`` (slots beside one per expert).
    """

    make: Callable[[Sequence[BoolArray], int], str]
    suffix: str
    use: str


ENGINES = {
    "sglang": Engine(sglang, ".json", "--init-expert-location {path} --ep-num-redundant-experts {spare}"),
    "tensorrt_llm": Engine(tensorrt_llm, ".yaml", "moe_config: {{load_balancer: {path}}}"),
    "vllm_ascend": Engine(vllm_ascend, ".json", "eplb_config: {{expert_map_path: {path}}}"),
}


def write_placement(layers: Sequence[BoolArray], engine: str, path: Path, first_layer: int = 0) -> None:
    """Write a placement for an engine.

    Args:
        layers: by MoE layer bool ``[num_experts, world_size]``.
        engine: one of :data:`ENGINES`.
        path: the file.
        first_layer: the model's number of the first layer with experts.

    Raises:
        ValueError: the engine would not read a file of that name, or could not take the placement.
    """
    kind = ENGINES[engine]
    if path.suffix != kind.suffix:
        raise ValueError(f"--out: {str(path)!r}, must end in {kind.suffix} for {engine}")
    if first_layer < 0:
        raise ValueError(f"--first-layer: {first_layer}, must be at least 0")
    write_text(path, kind.make(layers, first_layer))
