"""A sweep of two points, the second of which misbehaves on demand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.results.run_folder import RunFolder
from tests.experiments.command import Command
from tests.experiments.faulty import reached
from tests.programs import Programs

START_S = 90
#: How soon all processes of a run have to be gone.
STOP_S = 10
_TABLES = ("layers.parquet", "iterations.parquet", "summary.json")


class FaultySweep:
    """The same command every time; what its second point does stands in a file."""

    def __init__(self, folder: Path, programs: Programs, *overrides: str) -> None:
        self._programs, self._overrides = programs, overrides
        self.folder, self.results, self.switch = folder, folder / "results", folder / "second"

    def start(self, behaviour: str | None, *launcher: str) -> Command:
        """Start the sweep, or a ``launcher`` of it; its second point will ``raise``, ``stall`` or behave (None)."""
        reached(self.switch).unlink(missing_ok=True)
        self.switch.unlink(missing_ok=True)
        if behaviour is not None:
            self.switch.write_text(behaviour)
        return Command(
            self.folder,
            *launcher,
            "run.py",
            "experiment=smoke",
            "system=[static_ep]",
            "+systems.faulty={_target_:tests.experiments.faulty.Faulty}",
            f"+systems.faulty.switch={self.folder / 'first'},{self.switch}",
            "router.skew=0.9",
            "wandb.mode=disabled",
            f"results_dir={self.results}",
            *self._overrides,
            programs=self._programs,
        )

    @contextmanager
    def stalled(self) -> Iterator[tuple[Command, int]]:
        """Start and wait until rank 1 of the second point sleeps in a round while rank 0 waits in a collective.

        Yields:
            The command and rank 1's process id.
        """
        with self.start("stall") as command:
            yield command, stalled_rank(self, command)

    def finished(self) -> dict[Path, dict[str, int]]:
        """Return the finished points, and when each of their files was changed last (ns)."""
        return {
            folder: {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
            for folder in self._folders()
            if RunFolder(folder).is_finished
        }

    def unfinished(self) -> dict[str, Any]:
        """Return the manifest of the one unfinished point; nothing that looks like results lies beside it."""
        (folder,) = (folder for folder in self._folders() if not RunFolder(folder).is_finished)
        assert not [name for name in _TABLES if (folder / name).exists()]
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest

    def _folders(self) -> list[Path]:
        return sorted(path.parent for path in self.results.glob("*/*/manifest.json"))


def stalled_rank(sweep: FaultySweep, command: Command) -> int:
    """Wait until rank 1 of the second point stalls, and return its process id."""
    marker = reached(sweep.switch)
    command.wait_until(lambda: marker.exists() and marker.read_text() != "", START_S)
    return int(marker.read_text())
