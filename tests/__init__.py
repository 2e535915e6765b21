"""The tests."""

from __future__ import annotations

import os
from pathlib import Path

# Without a GPU, Triton interprets its kernels; it looks when it is first imported, which PyTorch may do.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
