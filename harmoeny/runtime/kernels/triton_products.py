"""Grouped products by a Triton kernel of our own, for the types and chips that PyTorch's does not cover."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from harmoeny.choices import KernelName
from harmoeny.runtime.kernels.alone import NOTHING_ALONE, Alone
from harmoeny.runtime.kernels.grouped import GroupedProducts
from harmoeny.runtime.memory.experts import ExpertMLP, LayerExperts

#: Fewer rows than tensor cores multiply at a time would be padded.
_MIN_ROWS, _MAX_ROWS = 16, 128
#: Compute capabilities.
_ROOMY = (9, 10)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonProducts(GroupedProducts):
    """A tiled product over the slot pool; Triton, which comes with PyTorch for CUDA, is imported at the first call."""

    name: ClassVar[str] = KernelName.TRITON

    @staticmethod
    def supports(device: torch.device, experts: LayerExperts) -> bool:
        """Return whether Triton is there, for this device: CUDA, or any in its interpreter (``TRITON_INTERPRET=1``)."""
        here = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        types = all(w.dtype in _DTYPES for w in experts.weights.values())
        return here and types and isinstance(experts.function, ExpertMLP) and find_spec("triton") is not None

    def __call__(
        self, rows: Tensor, ends: Tensor, matrices: Tensor, bias: Tensor | None, alone: Alone = NOTHING_ALONE
    ) -> Tensor:
        """Multiply and add the bias in one kernel, and in a product each for slots that are multiplied alone."""
        from harmoeny.runtime.kernels.triton_kernel import grouped_linear

        (num_rows, num_in), (num_slots, _, num_out) = rows.shape, matrices.shape
        out = rows.new_empty(num_rows, num_out)
        for slot, part in alone.parts:
            if bias is None:
                torch.mm(rows[part], matrices[slot], out=out[part])
            else:
                torch.addmm(bias[slot], rows[part], matrices[slot], out=out[part])
        num_grouped = num_rows - alone.num_rows
        if num_grouped > 0:
            tiles = Tiles.choose(num_grouped, num_slots, rows.dtype, roomy=_is_roomy(rows.device))
            grouped_linear[tiles.grid(num_grouped, num_slots, num_out)](
                rows.contiguous(), ends, matrices, bias, out, num_slots, num_out, alone.least_rows, *matrices.stride(),
                NUM_IN=num_in,
                HAS_BIAS=bias is not None,
                SLOTS=_power_of_2(num_slots),
                PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
                UPCAST=rows.device.type == "cpu",  # the interpreter multiplies the bits of BF16 as integers
                TILE_ROWS=tiles.rows, TILE_OUT=tiles.columns, TILE_IN=tiles.inner,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
        return out


@dataclass(frozen=True)
class Tiles:
    """What one program of the kernel computes, and with how many warps.

    Attributes:
        rows: rows of one slot.
        columns: columns of their results.
        inner: columns of the rows that are multiplied at a time.
        num_warps: warps of the program.
        num_stages: what is multiplied and what is on its way from memory at the same time.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int = 3

    @classmethod
    def choose(cls, num_rows: int, num_slots: int, dtype: torch.dtype, *, roomy: bool = False) -> Tiles:
        """Return tiles of as many rows as a slot has on average, within what fits a multiprocessor.

        Args:
            num_rows: rows of all slots.
            num_slots: slots.
            dtype: of rows and matrices.
            roomy: a multiprocessor has 192 KiB for one program.
        """
        rows = min(_MAX_ROWS, max(_MIN_ROWS, _power_of_2(num_rows // num_slots)))
        if dtype == torch.float32:
            return cls(rows, 64, 32, num_warps=8 if rows == _MAX_ROWS else 4)
        if rows < _MAX_ROWS:
            return cls(rows, 128, 64, num_warps=4)
        # On an H100 the wider tile takes 0.8 times as long.
        return cls(rows, 256, 64, num_warps=8, num_stages=4) if roomy else cls(rows, 128, 64, num_warps=8)

    def grid(self, num_rows: int, num_slots: int, num_out: int) -> tuple[int, int]:
        """Return how many programs there are for columns and for rows, without knowing the rows of any slot.

        Every slot has at most one tile of rows that is not full; programs without a tile end at once.
        """
        return -(-num_out // self.columns), num_rows // self.rows + min(num_slots, num_rows)


@cache
def _is_roomy(device: torch.device) -> bool:
    """Return whether a program may have 192 KiB of a multiprocessor's memory: on Hopper and data centre Blackwell."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in _ROOMY


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
