"""How long a policy takes to plan, measured on the machine that simulates."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from experiments.simulator.flows import plan_fits
from harmoeny.modelled import PredictsExecuted
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy
from harmoeny.shared import make_plan

_REPEATS = 5
#: No more repeats once those of one plan have taken so long, in seconds.
_ENOUGH_S = 0.02


class PlanTimer:
    """Times plans alone; those that are too large to be made are extrapolated from smaller ones."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._compiled = False
        self._per_entry: tuple[float, float] | None = None

    def seconds(self, layer: int, counts: IntArray, placement: Placement) -> float:
        """Return the median time of a few plans of the same counts, in seconds.

        Where the plan would have no room and is not made (:func:`plan_flows`), its time is extrapolated: from plans of
        the first half and the first quarter of the ranks, or of halves of those, in a straight line over the entries of
        :attr:`Plan.tokens`. That is measured once, in the first layer that asks.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``.
            placement: the present residency.
        """
        if plan_fits(counts) or placement.num_shared or not isinstance(self._policy, PredictsExecuted):
            return self._median_s(counts, placement)
        if self._per_entry is None:
            self._per_entry = self._line(layer, counts)
        base_s, entry_s = self._per_entry
        return base_s + entry_s * _num_entries(counts)

    def _line(self, layer: int, counts: IntArray) -> tuple[float, float]:
        """Return the time of no entry and of one, seconds, from the two largest plans by halving that have room."""
        ranks = len(counts) // 2
        while not plan_fits(counts[:ranks]):
            ranks //= 2
        points = []
        for world_size in (max(ranks // 2, 1), ranks):
            part = np.ascontiguousarray(counts[:world_size])
            placement = self._policy.place(layer, part.shape[1], world_size)
            points.append((_num_entries(part), self._median_s(part, placement, least=_REPEATS)))
        (few, few_s), (many, many_s) = points
        entry_s = max(0.0, many_s - few_s) / (many - few) if many > few else 0.0
        return max(0.0, many_s - entry_s * many), entry_s

    def _median_s(self, counts: IntArray, placement: Placement, least: int = 1) -> float:
        """Return the median of at least so many samples and of more if they are short, in seconds."""
        if not self._compiled:
            make_plan(self._policy, counts, placement)  # compiles what is compiled at the first call
            self._compiled = True
        samples: list[float] = []
        while len(samples) < least or (len(samples) < _REPEATS and sum(samples) < _ENOUGH_S):
            begin = time.perf_counter()
            make_plan(self._policy, counts, placement)
            samples.append(time.perf_counter() - begin)
        return median(samples)


def _num_entries(counts: IntArray) -> int:
    """Return the entries of a plan's tokens, ``world_size * num_experts * world_size``."""
    return counts.size * len(counts)
