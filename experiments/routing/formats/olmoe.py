"""The pickles of OLMoE's routing analysis: a list with a Counter of assignments per analysed layer.

Source: https://github.com/allenai/OLMoE, scripts/run_routing_analysis.py (routing_output/*/expert_counts/*.pkl).
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.routing.formats.base import ReadOptions, RecordedBatch, Sample, TraceFormat, batch_of_counts
from experiments.routing.formats.counters import dense

#: All that such a pickle may name: counters, and what NumPy's scalars are made of. Nothing of it runs code.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "Counter"): Counter,
    ("numpy", "dtype"): np.dtype,
    **{
        (module, "scalar"): np.float64(0).__reduce__()[0]
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
}


class OLMoE(TraceFormat):
    """One batch per file, as one file is of one domain; layers are the recorded ones (of OLMoE: 0, 7 and 15)."""

    name: ClassVar[str] = "olmoe"
    description: ClassVar[str] = "OLMoE's expert_counts/*.pkl, a list of counters"

    def matches(self, sample: Sample) -> bool:
        """Look for a pickle."""
        return sample.head[:1] == b"\x80"

    def read(self, files: Sequence[Path], options: ReadOptions) -> Iterator[RecordedBatch]:
        """Yield a batch per file."""
        for path in files:
            counters = load_plain(path)
            if not isinstance(counters, list) or not counters:
                raise ValueError(f"{path}: {type(counters).__name__}, must be a list of counters")
            names = [str(position) for position in range(len(counters))]
            rows = {f"{path}: layer {name}": row for name, row in zip(names, counters, strict=True)}
            yield batch_of_counts(str(path), names, dense(rows, options.num_experts))


class _Plain(pickle.Unpickler):  # names are looked up in a closed list
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, must hold counters and numbers alone")
        return _ALLOWED[module, name]


def load_plain(path: Path) -> Any:
    """Load a pickle of counters and numbers.

    Raises:
        ValueError: it is damaged, or names anything else, which is not looked up, let alone called.
    """
    try:
        return _Plain(io.BytesIO(path.read_bytes())).load()
    except Exception as error:
        raise ValueError(f"{path}: refused ({' '.join(str(error).split())})") from error
