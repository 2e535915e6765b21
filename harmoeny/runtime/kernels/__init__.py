"""What computes a layer's experts from its slots: one expert after another, or all of a wave in one call."""

from __future__ import annotations

from harmoeny.choices import KernelName
from harmoeny.runtime.kernels.base import Kernel
from harmoeny.runtime.kernels.grouped import GroupedKernel, GroupedProducts
from harmoeny.runtime.kernels.grouped_mm import GroupedMM
from harmoeny.runtime.kernels.loop import LoopKernel
from harmoeny.runtime.kernels.triton_products import TritonProducts
from harmoeny.runtime.memory.slots import LayerSlots

#: From the fastest on.
_PRODUCTS: tuple[type[GroupedProducts], ...] = (GroupedMM, TritonProducts)


def make_kernel(name: str, slots: LayerSlots, *, filled: bool) -> Kernel:
    """Return what computes a layer's experts.

    Args:
        name: ``loop``, ``grouped_mm`` or ``triton``; ``auto``: on CUDA the first of ``grouped_mm``, ``triton`` and
            ``loop`` that can, elsewhere ``loop``, which loses nothing where computation is over when it returns.
        slots: the layer's.
        filled: whether weights are copied into the slots, where one call finds them all.

    Raises:
        ValueError: there is no such kernel, or it cannot compute these experts here.
    """
    if name not in tuple(KernelName):
        raise ValueError(f"kernel: {name!r}, must be one of {', '.join(KernelName)}")
    if name == KernelName.LOOP or (name == KernelName.AUTO and slots.device.type != "cuda"):
        return LoopKernel(slots)
    if filled:
        for products in _PRODUCTS:
            if name in (KernelName.AUTO, products.name) and products.supports(slots.device, slots.experts):
                return GroupedKernel(slots, products())
    if name == KernelName.AUTO:
        return LoopKernel(slots)
    dtype = next(iter(slots.experts.weights.values())).dtype
    raise ValueError(f"kernel: {name!r}, cannot compute these experts ({dtype}) on {slots.device}")
