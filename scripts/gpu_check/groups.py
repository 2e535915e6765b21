"""Grouped products of the same rows, spread evenly over a rank's experts or nearly all on two of them.

Balanced systems give every rank as many rows at any skew, but of fewer and larger slices beside many small ones. What
that costs depends on how a kernel cuts slices into tiles; measured are PyTorch's kernel, once for all slices, once for
the large and once for the small ones, and in pieces of some thousand rows, and Triton's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.kernels.grouped import GroupedProducts
from harmoeny.runtime.kernels.grouped_mm import GroupedMM
from harmoeny.runtime.kernels.triton_products import TritonProducts
from results_schema.printing import print_anything
from scripts.gpu_check.interleave import compare, interleave
from scripts.gpu_check.shapes import Measurement, parse_measurement

EVEN = "even"
#: A rank's part of the experts, and what of its rows its hot ones have.
_RANKS, _HOT, _HOT_SHARE = 4, 2, 0.9
_PIECE_ROWS = 4096


def measure(asked: Measurement) -> dict[str, Any]:
    """Measure the first product of an expert; ways of doing it by name, with their ratio to even slices."""
    shape, device = asked.shape, asked.device
    num_slots = max(_HOT + 1, shape.num_experts // _RANKS)
    own = torch.Generator().manual_seed(0)
    width = 2 * shape.intermediate_size
    matrices = torch.randn(num_slots, width, shape.hidden_size, generator=own).to(device, asked.dtype).transpose(1, 2)
    even, hot = slices(shape.layer_tokens * shape.top_k, num_slots)
    rows = torch.randn(int(even.sum()), shape.hidden_size, generator=own).to(device, asked.dtype)
    ways: dict[str, tuple[GroupedProducts, list[IntArray]]] = {
        EVEN: (GroupedMM(), [even]),
        "hot": (GroupedMM(), [hot]),
        "hot, large and small apart": (GroupedMM(), list(apart(hot))),
        "hot, in pieces": (GroupedMM(), list(pieces(hot, _PIECE_ROWS))),
    }
    if device.type == "cuda":
        ways |= {"even, triton": (TritonProducts(), [even]), "hot, triton": (TritonProducts(), [hot])}
    actions = {name: multiply(products, rows, matrices, calls) for name, (products, calls) in ways.items()}
    return compare(interleave(actions, device, asked.rounds), EVEN)


def slices(num_rows: int, num_slots: int) -> tuple[IntArray, IntArray]:
    """Return int64 ``[num_slots]`` twice: rows of every slot, even and with most on the first two."""
    hot = np.full(num_slots, (1 - _HOT_SHARE) / (num_slots - _HOT))
    hot[:_HOT] = _HOT_SHARE / _HOT
    shares = np.stack([np.full(num_slots, 1 / num_slots), hot])
    ends = np.rint(shares.cumsum(axis=1) * num_rows).astype(np.int64)
    even, skewed = np.diff(ends, axis=1, prepend=0)
    return even, skewed


def apart(tokens: IntArray) -> Iterator[IntArray]:
    """Return the rows of every slot in a call for the hot slots, and in one for the others."""
    for is_hot in (True, False):
        yield np.where((np.arange(len(tokens)) < _HOT) == is_hot, tokens, 0)


def pieces(tokens: IntArray, num_rows: int) -> Iterator[IntArray]:
    """Return the rows of every slot in calls of so many consecutive rows at most."""
    ends = tokens.cumsum()
    for begin in range(0, int(ends[-1]), num_rows):
        yield np.diff(ends.clip(begin, begin + num_rows), prepend=begin)


def multiply(
    products: GroupedProducts, rows: Tensor, matrices: Tensor, calls: list[IntArray]
) -> Callable[[], list[Tensor]]:
    """Return what multiplies consecutive rows, call by call.

    Args:
        products: multiplies.
        rows: ``[n, in]``.
        matrices: ``[num_slots, in, out]``.
        calls: int64 ``[num_slots]`` each, rows of every slot.
    """
    parts = torch.split(rows, [int(tokens.sum()) for tokens in calls])
    ends = [Device.of(rows.device).upload(tokens.cumsum().astype(np.int32)) for tokens in calls]
    return lambda: [products(part, e, matrices, None) for part, e in zip(parts, ends, strict=True)]


def main() -> None:
    """Measure and write."""
    print_anything()
    asked = parse_measurement("scripts.gpu_check.groups", __doc__)
    with torch.inference_mode():
        found = measure(asked)
    asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
