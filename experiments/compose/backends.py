"""What runs points: real ranks, or the simulator. Adding one is a class with these methods and its line in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from experiments.launch.ranks import Ranks
from experiments.point.point import Point
from experiments.results.begun import BegunRun
from experiments.simulator.backend import Simulator
from experiments.text.tokens import TokenFile


class Backend(Protocol):
    """What ``backend=NAME`` stands for.

    Attributes:
        name: its name in the configuration.
        simulated: whether numbers are predicted for the hardware that is described, not measured on this host's.
    """

    name: ClassVar[str]
    simulated: ClassVar[bool]

    def check(self, point: Point) -> None:
        """Refuse a point that it cannot run on any host.

        Raises:
            ValueError: a field, its value and what is allowed.
        """

    def check_host(self, point: Point) -> None:
        """Refuse a point that this host, or the ranks that were started on it, cannot run.

        Raises:
            ValueError: a field, its value and what is allowed.
        """

    def run(self, runs: Sequence[BegunRun], tokens: TokenFile | None) -> None:
        """Run the checked points of a group and write their results.

        Args:
            runs: of the points, each with its folder, whose manifest is there already.
            tokens: their text; None where nobody reads it.

        Raises:
            RunError: the run failed.
        """


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Ranks(), Simulator())}


def backend_named(name: str) -> Backend:
    """Return a backend.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r}, must be one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_of(point: Point) -> Backend:
    """Return what runs a point."""
    return backend_named(point.options.backend)
