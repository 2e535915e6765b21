"""A part of a sweep's grid that has every pair of values of every two options: pairwise covering, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from experiments.compose.part import PartSweeper
from harmoeny.placement import IntArray

#: The sweeper of ``hydra/sweeper=pairs``.
PAIRS_SWEEPER = "hydra_plugins.harmoeny_pairs.Pairs"
#: A grid with more points would take too long to look through.
_LARGEST_GRID = 200_000
#: A pair counts so many times less with every point that has it: new pairs come first, then the rarest.
_DISCOUNT = 64.0


class PairwiseSweeper(PartSweeper):
    """Hydra's own sweeper, which runs a part of the grid.

    Args:
        points: run at least so many of the grid's points; there are more if the pairs need them.
        also: ``option=value``: besides, every chosen point with this value, where the grid has it; None: no more.
        max_batch_size: as Hydra's own.
        params: likewise.
    """

    def __init__(
        self,
        points: int,
        also: str | None = None,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.points, self.also = points, also

    def jobs(self, overrides: Sequence[Override]) -> list[list[str]]:
        """Return the jobs."""
        return covering_jobs(overrides, self.points, self.also)


def covering_jobs(overrides: Sequence[Override], points: int, also: str | None = None) -> list[list[str]]:
    """Return the jobs of a sweep that has every pair of values.

    Which they are depends neither on the order of the options nor on that of their values.

    Args:
        overrides: parsed, as Hydra's own sweeper takes them.
        points: at least so many jobs, if the grid has them.
        also: ``option=value``: every chosen job with this value, too, where the grid has it.

    Raises:
        ValueError: a number below 1, or too large a grid, or ``also`` names neither an option nor a value.
    """
    if also is not None and not all(also.partition("=")):
        raise ValueError(f"hydra.sweeper.also: {also!r}, must be option=value or null")
    if points < 1:
        raise ValueError(f"hydra.sweeper.points: {points}, must be at least 1")
    (grid,) = BasicSweeper.split_arguments(list(overrides), None)
    if len(grid) > _LARGEST_GRID:
        raise ValueError(f"hydra/sweeper: 'pairs', must be basic with {len(grid)} points, over {_LARGEST_GRID}")
    sorted_jobs = sorted((sorted(job), place) for place, job in enumerate(grid))
    columns = zip(*(job for job, _ in sorted_jobs), strict=True)
    values = np.stack([np.unique(column, return_inverse=True)[1] for column in columns], axis=1).astype(np.int64)
    chosen = {sorted_jobs[row][1] for row in cover_pairs(values, points)}
    if also is not None:
        beside = {frozenset(_with(grid[place], also)) for place in chosen}
        chosen |= {place for place, job in enumerate(grid) if frozenset(job) in beside}
    return [grid[place] for place in sorted(chosen)]


def _with(job: Sequence[str], setting: str) -> list[str]:
    """Return a job with an option's value replaced."""
    name = setting.partition("=")[0]
    return [setting if part.partition("=")[0] == name else part for part in job]


def cover_pairs(values: IntArray, points: int) -> list[int]:
    """Choose rows such that every pair of values of two columns that any row has is in one of them.

    The row whose pairs are rarest so far comes next, so more rows than needed have every pair about equally often.

    Args:
        values: int64 ``[num_rows, num_columns]``.
        points: least number of rows; all where there are fewer.

    Returns:
        The rows in ascending order.
    """
    num_rows, num_columns = values.shape
    columns = [
        np.unique(values[:, list(pair)], axis=0, return_inverse=True)[1]
        for pair in combinations(range(num_columns), min(num_columns, 2))
    ]
    sizes = [int(column.max()) + 1 for column in columns]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    pairs = np.stack(columns, axis=1) + offsets[:-1]  # [num_rows, num_pairs]
    worth = np.ones(offsets[-1])
    chosen = np.zeros(num_rows, dtype=np.bool_)
    while not chosen.all() and (chosen.sum() < points or (worth == 1).any()):
        gain = np.where(chosen, -1.0, worth[pairs].sum(axis=1))
        best = int(gain.argmax())
        chosen[best] = True
        worth[pairs[best]] /= _DISCOUNT
    return [int(index) for index in np.flatnonzero(chosen)]
