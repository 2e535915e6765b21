"""The line in which a rank executes its experts' rows, and where it is cut into stages: pure numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.compiled import compiled, inlined
from harmoeny.placement import IntArray


class Stages(NamedTuple):
    """Every rank's rows in one line, expert after expert, cut into stages that are exchanged one after the other.

    A cut may go through an expert: then the same part of every source's rows is on either side of it, rounded down. So
    who sends how much at which stage follows from a plan's tokens.

    Attributes:
        begins: int64 ``[num_experts, world_size]``, rows of a rank's line before those of an expert; anything where it
            executes none.
        cuts: int64 ``[num_stages + 1, world_size]``, rows before each stage, from 0 on; last, all rows of the rank.
    """

    begins: IntArray
    cuts: IntArray

    @property
    def num_stages(self) -> int:
        """Number of stages; -1 where there are none."""
        return len(self.cuts) - 1

    def bounds(self, executed: IntArray) -> IntArray:
        """Return int64 ``[num_stages + 1, num_experts, world_size]``, an expert's rows at a rank before each cut.

        Args:
            executed: int64 ``[num_experts, world_size]``, rows that every rank executes.
        """
        bounds: IntArray = np.clip(self.cuts[:, None] - self.begins, 0, executed)
        return bounds


def stage_tokens(tokens: IntArray, bounds: IntArray, executed: IntArray) -> IntArray:
    """Return int64 ``[num_stages, ...]``, the tokens of every stage; their sum is ``tokens``.

    Args:
        tokens: int64, of any shape that the others can be broadcast to, how many rows one source sends.
        bounds: int64 ``[num_stages + 1, ...]``, as of :meth:`Stages.bounds`.
        executed: int64, rows of the expert at the rank, of all sources.
    """
    stages: IntArray = np.diff(tokens * bounds // np.maximum(executed, 1), axis=0)
    return stages


@compiled
def no_stages() -> Stages:
    """Return the stages where everything is exchanged at once: of no size."""
    return Stages(np.empty((0, 0), dtype=np.int64), np.empty((0, 0), dtype=np.int64))


@inlined
def stage_at(cuts: IntArray, rank: int, row: int) -> int:
    """Return the stage that has a row of a rank's line; ``cuts``: as of :class:`Stages`."""
    stage = 0
    while cuts[stage + 1, rank] <= row:
        stage += 1
    return stage


@inlined
def only_stage(cuts: IntArray, rank: int, begin: int, number: int) -> int:
    """Return the stage that has all of so many rows from ``begin`` on of a rank's line, -1 if they are at several."""
    stage = stage_at(cuts, rank, begin)
    return stage if begin + number <= cuts[stage + 1, rank] else -1


def stages_of_experts(stages: IntArray, executed: IntArray) -> Stages:
    """Return the stages where no expert is cut.

    Args:
        stages: int64 ``[num_experts, world_size]``, the stage of an expert at a rank, from 0 on.
        executed: int64 ``[num_experts, world_size]``, rows that every rank executes.
    """
    order = np.argsort(stages, axis=0, kind="stable")
    rows = np.take_along_axis(executed, order, axis=0)
    begins = np.empty_like(executed)
    np.put_along_axis(begins, order, np.cumsum(rows, axis=0) - rows, axis=0)
    numbers = np.arange(stages.max(initial=0) + 2)
    cuts = np.stack([executed.sum(axis=0, where=stages < number) for number in numbers])
    return Stages(begins, cuts)
