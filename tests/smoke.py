"""The smoke experiment as a command, and what it left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.experiments.command import Command


@dataclass(frozen=True)
class SmokeRun:
    """What a run of the smoke experiment left.

    Attributes:
        arguments: its command line.
        results: its results folder.
        output: what it printed.
        stray: processes that outlived it.
    """

    arguments: tuple[str, ...]
    results: Path
    output: str
    stray: set[int]

    @property
    def folders(self) -> list[Path]:
        """One folder per point, by skew."""
        return sorted(path.parent for path in self.results.glob("smoke/*/manifest.json"))


def run_smoke(folder: Path, *arguments: str) -> SmokeRun:
    """Run a command on the smoke experiment to its end."""
    # A calibrated threshold would depend on how busy this machine is.
    threshold = "systems.harmoeny.threshold=4"
    arguments = (*arguments, "run.py", "experiment=smoke", threshold, f"results_dir={folder / 'results'}")
    with Command(folder, *arguments) as command:
        status, stray = command.wait(150), command.remaining()
        assert status == 0, command.output()
        return SmokeRun(arguments, folder / "results", command.output(), stray)
