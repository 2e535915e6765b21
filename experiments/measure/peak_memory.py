"""How much memory a rank needs while it works, beyond what it holds anyway."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
_PROCESS = Path("/proc/self")


def with_peak_bytes(function: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Call a function and return what it returns, with the peak of this rank's memory above that at its beginning.

    On CUDA memory is what PyTorch's allocator gave out. On a CPU it is what the process has resident; free
    memory that the C library caches is released first, or it would hide what is needed. That costs time: time nothing
    together with this.

    Returns:
        The function's result, and the peak in bytes, or None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = function()
        return result, int(torch.cuda.max_memory_allocated(device)) - held
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # the peak becomes what is resident now
        held = _resident_peak_bytes()
    except (AttributeError, OSError):  # another C library, or no Linux
        return function(), None
    result = function()
    return result, _resident_peak_bytes() - held


def _resident_peak_bytes() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise OSError(f"{_PROCESS}/status: no VmHWM")
    return int(match[1]) * 1024
