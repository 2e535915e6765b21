"""The smoke experiment as a command, and what it left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.experiments.command import Command
from tests.programs import Programs

#: HarMoEny's plans then depend on nothing but the routing: calibrated costs depend on how busy this machine is. A fetch
#: takes as long as four tokens.
FIXED_COSTS = (
    "+systems.harmoeny.costs={token_s:1e-6,launch_s:0,weights_s:0,exchange_token_s:1e-6,fetch_s:4e-6,peer_fetch_s:4e-6,"
    "exchange_latency_s:0,copy_token_s:0,tile_tokens:1,grouped:0,"
    "node_ranks:0,inside_share:1,network_share:1,pair_share:1}"
)


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


def run_smoke(folder: Path, *arguments: str, programs: Programs | None = None) -> SmokeRun:
    """Run a command on the smoke experiment to its end, with ``programs`` without the seconds of imports."""
    arguments = (*arguments, "run.py", "experiment=smoke", FIXED_COSTS, f"results_dir={folder / 'results'}")
    with Command(folder, *arguments, programs=programs) as command:
        status, stray = command.wait(150), command.remaining()
        assert status == 0, command.output()
        return SmokeRun(arguments, folder / "results", command.output(), stray)
