"""Headless Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

#: Asks the tests to install Chromium where it is missing: a change of the system, so nobody gets it unasked.
INSTALL = "HARMOENY_INSTALL_CHROMIUM"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def need_chromium() -> str:
    """Return the browser's path; skip the test where it is missing, and cannot or shall not be installed."""
    reason = ""
    if _find() is None and os.environ.get(INSTALL) == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        reason = _install()
    path = _find()
    if path is None:
        pytest.skip(f"no Chromium here{reason}; {INSTALL}=1 lets the tests, as root, install chromium by apt-get")
    return path


def _find() -> str | None:
    return next((path for program in _PROGRAMS if (path := shutil.which(program))), None)


def _install() -> str:
    """Install the package; return why that failed, else nothing."""
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        try:
            subprocess.run(
                ["apt-get", "-qq", *arguments],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=150,
                check=True,
            )
        except subprocess.SubprocessError as error:
            return f" (apt-get {arguments[0]} failed: {getattr(error, 'stderr', None) or error})"
    return ""
