"""Where a module computes."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter, or the CPU where it has none."""
    device: torch.device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return device
