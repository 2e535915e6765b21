"""Headless Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.packages import install_packages

#: Asks the tests to install Chromium where it is missing: a change of the system, so nobody gets it unasked.
INSTALL = "HARMOENY_INSTALL_CHROMIUM"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def need_chromium() -> str:
    """Return the browser's path; skip the test where it is missing, and cannot or shall not be installed."""
    reason = ""
    if _find() is None and os.environ.get(INSTALL) == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        failed = install_packages("chromium")
        reason = f" ({failed})" if failed else ""
    path = _find()
    if path is None:
        pytest.skip(f"no Chromium here{reason}; {INSTALL}=1 lets the tests, as root, install chromium by apt-get")
    return path


def _find() -> str | None:
    return next((path for program in _PROGRAMS if (path := shutil.which(program))), None)
