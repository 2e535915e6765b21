"""A part of a sweep's grid: a few points in the middle, and what changes where one option leaves the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from experiments.compose.part import PartSweeper

#: The sweeper of ``hydra/sweeper=star``.
STAR_SWEEPER = "hydra_plugins.harmoeny_star.Star"


class StarSweeper(PartSweeper):
    """Hydra's own sweeper, which runs a part of the grid.

    Args:
        centres: by option, how many of its first values are the middle; 1 for an option that is not named.
        max_batch_size: as Hydra's own.
        params: likewise.
    """

    def __init__(
        self,
        centres: Mapping[str, int] | None = None,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.centres = dict(centres or {})

    def jobs(self, overrides: Sequence[Override]) -> list[list[str]]:
        """Return the jobs."""
        return star_jobs(overrides, self.centres)


def star_jobs(overrides: Sequence[Override], centres: Mapping[str, int]) -> list[list[str]]:
    """Return the jobs of the grid in which at most one option has another value than those of its middle.

    Args:
        overrides: parsed, as Hydra's own sweeper takes them.
        centres: by option, how many of its first values are the middle; 1 for others.

    Raises:
        ValueError: a number below 1.
    """
    for option, number in centres.items():
        if number < 1:
            raise ValueError(f"hydra.sweeper.centres.{option}: {number}, must be at least 1")
    (grid,) = BasicSweeper.split_arguments(list(overrides), None)
    middle = {
        f"{name}={value}"
        for override in overrides
        if (name := override.get_key_element()) and override.is_sweep_override()
        for value in list(override.sweep_string_iterator())[: centres.get(name, 1)]
    }
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    return [job for job in grid if sum(_name(o) in swept and o not in middle for o in job) <= 1]


def _name(override: str) -> str:
    return override.partition("=")[0]
