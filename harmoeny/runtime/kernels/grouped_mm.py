"""PyTorch's own grouped matrix product."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from harmoeny.choices import KernelName
from harmoeny.runtime.kernels.alone import NOTHING_ALONE, Alone
from harmoeny.runtime.kernels.grouped import GroupedProducts
from harmoeny.runtime.kernels.triton_products import TritonProducts
from harmoeny.runtime.memory.experts import ExpertMLP, LayerExperts

#: Public since PyTorch 2.10.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
#: Before it, and for other types than BF16, PyTorch loops over the groups and waits for the device.
_FIRST_CAPABILITY = (9, 0)
_ALIGNMENT_BYTES = 16


class GroupedMM(GroupedProducts):
    """``torch.nn.functional.grouped_mm``: one kernel for BF16 on Hopper and later; on a CPU, to test with, a loop."""

    name: ClassVar[str] = KernelName.GROUPED_MM

    @staticmethod
    def supports(device: torch.device, experts: LayerExperts) -> bool:
        """Return whether PyTorch has a kernel for it."""
        matrices = [w for w in experts.weights.values() if w.ndim == 3]
        aligned = all(n * w.element_size() % _ALIGNMENT_BYTES == 0 for w in matrices for n in w.shape[1:])
        if not aligned or not isinstance(experts.function, ExpertMLP):
            return False
        if device.type != "cuda":
            return device.type == "cpu"
        bf16 = all(w.dtype == torch.bfloat16 for w in matrices)
        return bf16 and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY

    def __call__(
        self, rows: Tensor, ends: Tensor, matrices: Tensor, bias: Tensor | None, alone: Alone = NOTHING_ALONE
    ) -> Tensor:
        """Multiply, then add the bias, which PyTorch's kernel does not take yet.

        That kernel takes rows without gaps, so what is left between slots that are multiplied for themselves is
        Triton's.
        """
        if alone.parts:
            return TritonProducts()(rows, ends, matrices, bias, alone)
        product: Tensor = _grouped_mm(rows, matrices, offs=ends)
        if bias is not None:
            row = torch.arange(len(rows), dtype=ends.dtype, device=ends.device)
            slot = torch.searchsorted(ends, row, right=True, out_int32=True).clamp_(max=len(ends) - 1)
            product += bias.index_select(0, slot)
        return product
