"""Installs Debian packages that some tests need, as root and only where a variable of the environment asks for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path


def install_packages(*packages: str) -> str:
    """Install packages by apt-get, one test worker after the other; return why that failed, else nothing."""
    with Path(tempfile.gettempdir(), "harmoeny-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            try:
                subprocess.run(
                    ["apt-get", "-qq", *arguments],
                    env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                    capture_output=True,
                    text=True,
                    timeout=150,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError) as error:
                return f"apt-get {arguments[0]} failed: {getattr(error, 'stderr', None) or error}"
    return ""
