"""Grouped products of the same rows, spread evenly over a rank's experts or nearly all on a few of them.

Balanced systems give every rank as many rows at any skew, but of fewer and larger slices beside many small ones. What
that costs depends on how a kernel cuts slices into tiles; measured are PyTorch's kernel, Triton's, and a product of
its own for every large slice beside Triton's for the others, whichever the runtime would choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.kernels.alone import NOTHING_ALONE, Alone, find_alone
from harmoeny.runtime.kernels.grouped import GroupedProducts
from harmoeny.runtime.kernels.grouped_mm import GroupedMM
from harmoeny.runtime.kernels.triton_products import TritonProducts
from results_schema.printing import print_anything
from scripts.gpu_check.interleave import compare, interleave
from scripts.gpu_check.shapes import Measurement, parse_measurement

EVEN = "even"
#: A rank's part of the experts, how many of them are hot, and what of its rows these have.
_RANKS, _HOT, _HOT_SHARE = 4, (2, 8), 0.9


def measure(asked: Measurement) -> dict[str, Any]:
    """Measure the first product of an expert; ways of doing it by name, with their ratio to even slices."""
    shape, device = asked.shape, asked.device
    num_slots = max(*_HOT, shape.num_experts // _RANKS) + 1
    own = torch.Generator().manual_seed(0)
    width = 2 * shape.intermediate_size
    matrices = torch.randn(num_slots, width, shape.hidden_size, generator=own).to(device, asked.dtype).transpose(1, 2)
    num_rows = shape.layer_tokens * shape.top_k
    rows = torch.randn(num_rows, shape.hidden_size, generator=own).to(device, asked.dtype)
    spread = {EVEN: slices(num_rows, num_slots, 0)} | {f"{n} hot": slices(num_rows, num_slots, n) for n in _HOT}
    actions = {}
    for name, tokens in spread.items():
        actions[name] = multiply(GroupedMM(), rows, matrices, tokens, NOTHING_ALONE)
        if device.type == "cuda":  # where Triton is
            actions[f"{name}, triton"] = multiply(TritonProducts(), rows, matrices, tokens, NOTHING_ALONE)
            large = find_alone(tokens, int(tokens.max()))
            if large.parts and name != EVEN:
                actions[f"{name}, alone"] = multiply(TritonProducts(), rows, matrices, tokens, large)
    return compare(interleave(actions, device, asked.rounds), EVEN)


def slices(num_rows: int, num_slots: int, num_hot: int) -> IntArray:
    """Return int64 ``[num_slots]``, rows of every slot, with most, as many each, on the first ``num_hot``; 0: even."""
    shares = np.full(num_slots, 1 / num_slots)
    if num_hot:
        shares[:] = (1 - _HOT_SHARE) / (num_slots - num_hot)
        shares[:num_hot] = _HOT_SHARE / num_hot
    tokens: IntArray = np.floor(shares * num_rows).astype(np.int64)
    tokens[num_hot:][: num_rows - int(tokens.sum())] += 1
    return tokens


def multiply(
    products: GroupedProducts, rows: Tensor, matrices: Tensor, tokens: IntArray, alone: Alone
) -> Callable[[], Tensor]:
    """Return what multiplies consecutive rows.

    Args:
        products: multiplies.
        rows: ``[n, in]``.
        matrices: ``[num_slots, in, out]``.
        tokens: int64 ``[num_slots]``, rows of every slot.
        alone: slots that are multiplied for themselves.
    """
    ends = Device.of(rows.device).upload(tokens.cumsum().astype(np.int32))
    return lambda: products(rows, ends, matrices, None, alone)


def main() -> None:
    """Measure and write."""
    print_anything()
    asked = parse_measurement("scripts.gpu_check.groups", __doc__)
    with torch.inference_mode():
        found = measure(asked)
    asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
