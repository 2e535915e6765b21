"""Checksums of what a finished run consists of, kept in its manifest: a file that was damaged since is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_schema.files import CONFIG
from results_schema.tables import TABLES

#: The manifest's field: by file, the SHA-256 of its content.
FIELD = "checksums"


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of a run's configuration and tables, by file."""
    names = (CONFIG, *(table.file for table in TABLES))
    return {name: _sha256(folder / name) for name in names if (folder / name).is_file()}


def damaged(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Return the files that are missing, or are not as the run wrote them; a run without checksums has none."""
    kept: dict[str, str] = manifest.get(FIELD) or {}
    return [folder / name for name, digest in kept.items() if _sha256(folder / name) != digest]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
