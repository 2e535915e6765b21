"""The folder of a run and all that is written there, by real ranks and the simulator alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.point.point import Point
from experiments.results.group import new_group
from experiments.results.manifest import new_manifest, now
from experiments.results.neighbours import Neighbours
from results_schema import files
from results_schema.atomic import atomic_path, write_text
from results_schema.checksums import FIELD, checksums, damaged
from results_schema.manifest import Status, is_finished, read_manifest
from results_schema.tables import TABLES, Table

_SLURM = "slurm.json"
#: Held by whoever runs the point (lock.py).
LOCK = ".lock"


class RunError(RuntimeError):
    """A run failed; the message is the reason, as its manifest gives it."""


class RunFolder:
    """A run's files, from the manifest that says that it runs to the one that says how it ended.

    :meth:`begin` comes first. Whoever has the path can go on with a run that another process began; what one process
    writes the next one reads.
    """

    def __init__(self, path: Path, neighbours: Neighbours | None = None) -> None:
        self.path = path
        self._neighbours = neighbours

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest; empty where there is none or it is damaged."""
        try:
            return read_manifest(self.path)
        except ValueError:
            return {}

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end; one with a damaged manifest counts as unfinished."""
        return is_finished(self.path)

    @property
    def damaged(self) -> list[Path]:
        """Files of a finished run that are not as they were written."""
        return damaged(self.path, self.manifest) if self.is_finished else []

    @property
    def failed_systems(self) -> dict[str, str]:
        """Systems that failed their check and have no numbers, with the reason."""
        return dict(self.manifest.get("failed_systems") or {})

    def begin(self, point: Point, group: Mapping[str, Any] | None = None) -> None:
        """Remove what an unfinished run left and write down what runs now.

        Args:
            point: what runs.
            group: what is measured together with it (:func:`experiments.results.group.new_group`); None: nothing.
        """
        self.forget()
        write_text(self.path / files.CONFIG, yaml.safe_dump(point.config, sort_keys=False))
        self._write_manifest(new_manifest(point) | {"group": dict(group or new_group([point]))})

    def describe(
        self,
        fields: Mapping[str, Any],
        systems: Mapping[str, Mapping[str, Any]] | None = None,
        left_out: Iterable[str] = (),
    ) -> None:
        """Add to the manifest.

        Args:
            fields: of the manifest.
            systems: by system, fields of its own.
            left_out: systems that give no numbers.
        """
        manifest = self.manifest | dict(fields)
        for name, own in (systems or {}).items():
            manifest["systems"][name] |= own
        for name in left_out:
            del manifest["systems"][name]
        self._write_manifest(manifest)

    def write_tables(self, tables: Mapping[Table, pd.DataFrame]) -> None:
        """Write tables, their columns in the order of the schema."""
        for table, frame in tables.items():
            with atomic_path(self.path / table.file) as temporary:
                frame[list(table.column_names)].to_parquet(temporary, index=False)

    def finish(self) -> None:
        """Say that the run came to its end: from now on its tables count."""
        beside = {} if self._neighbours is None else {"beside": self._neighbours.met()}
        ending = {"status": Status.FINISHED, "ended_at": now(), FIELD: checksums(self.path)}
        self._write_manifest(self.manifest | beside | ending)

    def fail(self, reason: str) -> None:
        """Say why the run failed; one that has not begun, or has ended, is left as it is."""
        manifest = self.manifest
        if manifest.get("status") != Status.RUNNING:
            return
        self._remove_tables()  # nobody may read them, and a full disk needs the room
        failed = manifest | {"status": Status.FAILED, "ended_at": now(), "error": reason}
        try:
            self._write_manifest(failed)
        except OSError:  # a full disk may have no room for a second file, but the first one's
            with suppress(OSError), (self.path / files.MANIFEST).open("r+", encoding="utf-8") as file:
                file.write(_as_json(failed))
                file.truncate()

    def forget(self) -> None:
        """Remove what an unfinished run left, so that its numbers never mix with the new ones."""
        (self.path / files.MANIFEST).unlink(missing_ok=True)
        self._remove_tables()
        for temporary in self.path.glob(".*"):
            if temporary.name != LOCK:
                temporary.unlink()

    def _remove_tables(self) -> None:
        for name in (files.SUMMARY, *(table.file for table in TABLES)):
            (self.path / name).unlink(missing_ok=True)

    def note_submission(self, job: str, output: Path) -> None:
        """Write down which SLURM job runs the point, and where that job's output goes."""
        write_text(self.path / _SLURM, json.dumps({"job": job, "output": str(output)}) + "\n")

    @property
    def submission(self) -> dict[str, str]:
        """The ``job`` and ``output`` of :meth:`note_submission`; empty where there are none."""
        try:
            submission: dict[str, str] = json.loads((self.path / _SLURM).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return submission

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.path / files.MANIFEST, _as_json(manifest))


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"
