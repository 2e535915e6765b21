"""vLLM's load windows: the tensor of ``EplbState.expert_load_window`` as somebody saved it, or the public JSON of them.

Source: https://docs.vllm.ai, vllm.distributed.eplb.eplb_state ([window, layer, physical expert] and
``physical_to_logical_map``); abmfy/eplb-openevolve, expert-load.json (``load_history`` of ``logical_expert_load``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.routing.formats.base import (
    ReadOptions,
    RecordedBatch,
    Sample,
    TraceFormat,
    batch_of_counts,
    load_tensors,
)
from experiments.routing.formats.json_stream import elements
from experiments.routing.formats.physical import logical_counts
from experiments.routing.trace import RecordedRouting
from results_schema.atomic import atomic_path

_WINDOW, _MAP, _HISTORY, _LOAD = "expert_load_window", "physical_to_logical_map", "load_history", "logical_expert_load"


class VLLM(TraceFormat):
    """Counts by window, over all ranks."""

    name: ClassVar[str] = "vllm"
    description: ClassVar[str] = "vLLM's expert load windows (.npy, .pt, or .json with load_history)"

    def matches(self, sample: Sample) -> bool:
        """Look for an array of three dimensions, or the names of what holds one."""
        if sample.head.startswith(b"\x93NUMPY"):
            return True
        if sample.text.startswith("{") and f'"{_HISTORY}"' in sample.text:
            return True
        tensors = sample.tensors
        return getattr(tensors, "ndim", 0) == 3 or (isinstance(tensors, Mapping) and _WINDOW in tensors)

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:  # noqa: ARG002
        """Yield a batch per window in which something ran."""
        for path in files:
            for number, counts in enumerate(_windows(path)):
                batch = batch_of_counts(f"{path}: window {number}", _names(counts), counts)
                if batch.counts.any():
                    yield batch

    def write(self, trace: RecordedRouting, path: Path) -> None:
        """Write the windows as one array ``[window, layer, expert]``."""
        if path.suffix != ".npy":
            raise ValueError(f"--out: {str(path)!r}, must end in .npy")
        with atomic_path(path) as temporary:
            np.save(temporary, trace.counts.sum(axis=2).astype(np.int32))


def _names(counts: Any) -> list[str]:
    return [str(layer) for layer in range(len(counts))]


def _windows(path: Path) -> Iterator[Any]:
    """Yield ``[num_layers, num_experts]`` per window."""
    if Sample.of(path).text.startswith("{"):
        for number, element in enumerate(elements(path, _HISTORY)):
            if not isinstance(element, Mapping) or _LOAD not in element:
                raise ValueError(f"{path}: window {number}: has no {_LOAD}")
            yield element[_LOAD]
        return
    windows = _array(path)
    if windows.ndim != 3:
        raise ValueError(f"{path}: an array of shape {list(windows.shape)}, must be [windows, layers, experts]")
    yield from windows


def _array(path: Path) -> Any:
    if Sample.of(path).head.startswith(b"\x93NUMPY"):
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no readable array of NumPy ({error})") from error
    content = load_tensors(path)
    if isinstance(content, Mapping):
        if _WINDOW not in content:
            raise ValueError(f"{path}: has no {_WINDOW}")
        window = np.asarray(content[_WINDOW])
        return logical_counts(str(path), window, content[_MAP]) if _MAP in content else window
    return np.asarray(content)
