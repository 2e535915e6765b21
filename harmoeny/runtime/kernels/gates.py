"""Gates between an expert's matrices in one pass over memory, in place of one per operator."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from harmoeny.runtime.memory.experts import swiglu

#: What a program computes.
_TILE_ROWS, _MOST_COLUMNS = 8, 256


def fastest_gate(between: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as ``between`` on the device, sooner where there is such a thing."""
    if between is swiglu and device.type == "cuda" and find_spec("triton") is not None:
        return fused_swiglu
    return between


def fused_swiglu(gate_up_RF: Tensor) -> Tensor:
    """Return :func:`harmoeny.runtime.memory.experts.swiglu` of ``[R, 2 * F]``, rounded once and not twice."""
    from harmoeny.runtime.kernels.triton_gates import swiglu_rows

    num_rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    out = gate_up_RF.new_empty(num_rows, width)
    if num_rows > 0:
        columns = min(_MOST_COLUMNS, 1 << max(0, width - 1).bit_length())
        swiglu_rows[(-(-num_rows // _TILE_ROWS), -(-width // columns))](
            gate_up_RF.contiguous(), out, num_rows, WIDTH=width, TILE_ROWS=_TILE_ROWS, TILE_COLUMNS=columns
        )
    return out
