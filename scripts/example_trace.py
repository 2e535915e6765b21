"""Write the trace that is shipped as an example (results/traces/example.parquet): synthetic, and it says so.

A batch is a window of two million tokens: some 60 prefill passes of 8 x 4,096, and thousands of decode steps.
Popularity is lognormal (the hottest of 128 experts has some 5 times an even share, as is published of models that are
served), drifts from batch to batch, and is drawn anew for every third expert after half of the batches, as where the
requests' topic changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from experiments.routers.base import exact_counts
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import write_trace
from results_schema.printing import print_anything

OUT = Path("results/traces/example.parquet")
NUM_BATCHES, NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_TOKENS = 24, 4, 128, 8, 2**21
#: Standard deviation of the logarithm of popularity, and what is left of a deviation one batch later.
_SPREAD, _KEPT = 0.9, 0.97


def example_trace(path: Path) -> RecordedRouting:
    """Draw the trace."""
    rng = np.random.default_rng(0)
    deviation = rng.standard_normal((NUM_LAYERS, NUM_EXPERTS))
    counts = np.zeros((NUM_BATCHES, NUM_LAYERS, 1, NUM_EXPERTS), dtype=np.int64)
    for batch in range(NUM_BATCHES):
        if batch == NUM_BATCHES // 2:
            deviation[:, ::3] = rng.standard_normal(deviation[:, ::3].shape)
        weights = np.exp(_SPREAD * deviation)
        for layer, row in enumerate(weights / weights.sum(axis=1, keepdims=True)):
            counts[batch, layer, 0] = exact_counts(row, NUM_TOKENS, TOP_K, rng)
        deviation = _KEPT * deviation + np.sqrt(1 - _KEPT**2) * rng.standard_normal(deviation.shape)
    num_tokens = np.full(counts.shape[:3], NUM_TOKENS, dtype=np.int64)
    return RecordedRouting(str(path), "128 experts, top-8", "synthetic drift", TOP_K, num_tokens, counts)


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.example_trace", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (%(default)s)")
    out = parser.parse_args().out
    write_trace(example_trace(out), "example")
    print(out)


if __name__ == "__main__":
    main()
