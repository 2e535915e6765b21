"""Uploads recorded W&B runs at the end of a sweep; a missing key or network costs a few seconds, once, and no data.

Uploading while points are measured would disturb them, and waiting for a network would delay them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

#: Uploading ends when no further run was uploaded for so many seconds.
PATIENCE_S = 30.0
_POLL_S = 0.1


def upload(folders: Sequence[Path], *, patience_s: float = PATIENCE_S) -> bool:
    """Upload what is recorded in ``wandb`` of these folders and was not uploaded before.

    What cannot be uploaded is a warning, and is tried again by the next call.

    Args:
        folders: of runs and sweeps.
        patience_s: wait no longer than this for the next run to be uploaded.

    Returns:
        Whether everything is uploaded now.
    """
    files = [path for folder in folders for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    todo = _pending(files)
    if not todo:
        return True
    try:
        reason = _sync(todo, patience_s)
    except OSError as error:
        reason = str(error)
    left = _pending(todo)
    if left:
        warnings.warn(
            f"W&B: {len(left)} of {len(todo)} runs were not uploaded ({reason}); they are recorded, and the same "
            "command again tries again (docs/wandb.md)",
            stacklevel=2,
        )
    return not left


def _pending(files: Sequence[Path]) -> list[Path]:
    return [path for path in files if not path.with_suffix(".wandb.synced").exists()]


def _sync(files: Sequence[Path], patience_s: float) -> str:
    """Run ``wandb sync`` and return the last thing that it said, or that it took too long."""
    with tempfile.TemporaryDirectory() as folder, Path(folder, "output").open("w+b") as output:
        process = subprocess.Popen(  # noqa: S603  (a fixed command on our own files)
            [sys.executable, "-m", "wandb", "sync", *map(str, files)],
            env=os.environ | {"WANDB_ERROR_REPORTING": "false", "WANDB_DIR": folder},  # its logs go there
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            left, since = len(files), time.monotonic()
            while process.poll() is None:
                if (now := len(_pending(files))) < left:
                    left, since = now, time.monotonic()
                if time.monotonic() - since > patience_s:
                    return f"nothing happened for {patience_s:g} s"
                time.sleep(_POLL_S)
        finally:
            process.kill()  # W&B's own process ends when its parent does
            process.wait()
        output.seek(0)
        lines = [line.strip() for line in output.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), f"exit status {process.returncode}")
