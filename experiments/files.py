"""Where prepared data is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: ``$HARMOENY_CACHE``, else ``harmoeny`` under the user's cache folder; it is created.

    Raises:
        ValueError: it cannot be created.
    """
    chosen = os.environ.get("HARMOENY_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(chosen) if chosen else home / "harmoeny"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"HARMOENY_CACHE: {str(path)!r} cannot be created ({error.strerror}), must be a folder"
        ) from error
    return path
