"""Places experts such that few tokens change rank between layers: sweeps, an integer programme, halving of the ranks.

No policy stands here; ExFlow uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linear_sum_assignment, milp
from scipy.sparse import csr_array

from harmoeny.placement import IntArray

FloatArray = npt.NDArray[np.float64]

#: Largest integer programme that is tried, in variables: its root takes seconds. Above it the ranks are halved.
_MAX_VARIABLES = 1000
#: Layers that the sweeps start from.
_MAX_STARTS = 4


@dataclass(frozen=True)
class Solution:
    """A placement of consecutive layers.

    Attributes:
        ranks: int64 ``[num_experts]`` per layer, every expert's rank.
        crossings: pairs of assignments to consecutive layers that are on different ranks.
        lower_bound: no placement has fewer crossings.
    """

    ranks: list[IntArray]
    crossings: int
    lower_bound: int


def count_crossings(pairs: Sequence[IntArray], ranks: Sequence[IntArray]) -> int:
    """Count the pairs that a placement puts on different ranks."""
    return sum(
        int(p[before[:, None] != after[None, :]].sum())
        for p, before, after in zip(pairs, ranks[:-1], ranks[1:], strict=True)
    )


def place_by_affinity(pairs: Sequence[IntArray], sizes: IntArray, node_limit: int) -> Solution:
    """Look for the placement with the fewest crossings.

    The sweeps give a first placement. Where it is small enough, an integer programme over all layers at once looks for
    a better one and bounds the crossings from below; SciPy hands HiGHS no starting point, so the better of the two
    counts. Where it is too large, the ranks are halved: first the experts are divided between two halves of the ranks,
    then each half goes on by itself, and sweeps over all ranks end it.

    Args:
        pairs: int64 ``[n, n]`` per two consecutive layers, as :func:`count_pairs` gives them; with none there is one
            layer.
        sizes: int64 ``[num_ranks]``, experts that every rank holds in each layer; they sum to n.
        node_limit: of every integer programme, which makes its result the same however fast the machine is. With 0
            there are only the sweeps.
    """
    ranks = _sweeps(pairs, sizes)
    found = Solution(ranks, count_crossings(pairs, ranks), 0)
    if found.crossings == 0 or node_limit == 0:
        return found
    if sum(np.count_nonzero(p) for p in pairs) * len(sizes) <= _MAX_VARIABLES:
        return _better(_solve_at_once(pairs, sizes, node_limit), found)
    if len(sizes) > 2:
        return _better(_solve_by_halves(pairs, sizes, node_limit), found)
    return found


def _better(solution: Solution | None, other: Solution) -> Solution:
    if solution is None:
        return other
    best = min(solution, other, key=lambda s: s.crossings)
    return Solution(best.ranks, best.crossings, min(solution.lower_bound, best.crossings))


def _assign(gain: IntArray, sizes: IntArray) -> IntArray:
    """Return int64 ``[n]``, the ranks with the greatest sum of ``gain`` (``[n, num_ranks]``) under ``sizes``."""
    _, seats = linear_sum_assignment(np.repeat(gain, sizes, axis=1), maximize=True)
    ranks: IntArray = np.repeat(np.arange(len(sizes)), sizes)[seats]
    return ranks


def _sweeps(pairs: Sequence[IntArray], sizes: IntArray) -> list[IntArray]:
    """Place one layer by number, then the others from it outwards, then improve; the best of several first layers."""
    num_layers = len(pairs) + 1
    contiguous: IntArray = np.repeat(np.arange(len(sizes)), sizes)
    candidates = []
    for start in np.unique(np.linspace(0, num_layers - 1, min(num_layers, _MAX_STARTS)).astype(np.int64)):
        placed = {int(start): contiguous}
        for layer in [*range(start + 1, num_layers), *range(start - 1, -1, -1)]:
            placed[layer] = _assign(_gain(pairs, placed, layer, sizes), sizes)
        candidates.append(_improve(pairs, [placed[layer] for layer in range(num_layers)], sizes))
    return min(candidates, key=lambda ranks: count_crossings(pairs, ranks))


def _improve(pairs: Sequence[IntArray], ranks: list[IntArray], sizes: IntArray) -> list[IntArray]:
    """Place every layer anew, the best for its neighbours, again and again until nothing gets better."""
    crossings = count_crossings(pairs, ranks)
    while crossings:
        placed = dict(enumerate(ranks))
        for layer in placed:
            placed[layer] = _assign(_gain(pairs, placed, layer, sizes), sizes)
        fewer = count_crossings(pairs, list(placed.values()))
        if fewer >= crossings:
            break
        ranks, crossings = list(placed.values()), fewer
    return ranks


def _gain(pairs: Sequence[IntArray], placed: Mapping[int, IntArray], layer: int, sizes: IntArray) -> IntArray:
    """Return int64 ``[n, num_ranks]``, the pairs with placed neighbours that an expert of ``layer`` keeps there."""
    gain = np.zeros((int(sizes.sum()), len(sizes)), dtype=np.int64)
    for neighbour, counts in _neighbours(pairs, layer):
        if neighbour in placed:
            gain += counts @ (placed[neighbour][:, None] == np.arange(len(sizes))).astype(np.int64)
    return gain


def _neighbours(pairs: Sequence[IntArray], layer: int) -> Iterator[tuple[int, IntArray]]:
    """Yield the layers next to ``layer`` with the pairs, ``[n, n]`` from an expert of ``layer`` to one of theirs."""
    if layer > 0:
        yield layer - 1, pairs[layer - 1].T
    if layer < len(pairs):
        yield layer + 1, pairs[layer]


def _solve_at_once(pairs: Sequence[IntArray], sizes: IntArray, node_limit: int) -> Solution | None:
    """Solve the integer programme over all layers; None where the limit was reached before any placement was found."""
    programme = _Programme(pairs, sizes)
    result = programme.solve(node_limit)
    if result.x is None:
        return None
    ranks = programme.ranks(result.x)
    lower_bound = int(np.ceil(programme.total + result.mip_dual_bound - 1e-4))
    return Solution(ranks, count_crossings(pairs, ranks), max(0, lower_bound))


class _Programme:
    """The integer programme over all layers at once, aggregated over pairs of experts.

    ``x[l, e, r]`` (binary) puts an expert of a layer on a rank; ``z[l, e, f, r]`` (0 to 1) says that e of layer l and f
    of layer l + 1 are both on r. The pairs kept, ``sum of pairs * z``, are maximised subject to: one rank per expert;
    ``sizes`` experts per rank and layer; ``z <= x`` at both ends; and, to tighten the relaxation, no expert keeps more
    neighbours on its rank than the rank holds. Ranks of one size are interchangeable, so where all are, expert e of the
    first layer is on one of the ranks 0 to e.
    """

    def __init__(self, pairs: Sequence[IntArray], sizes: IntArray) -> None:
        self.sizes = sizes
        self.n, self.num_ranks, self.num_layers = int(sizes.sum()), len(sizes), len(pairs) + 1
        self.total = sum(int(p.sum()) for p in pairs)
        layers = [np.full(np.count_nonzero(p), i) for i, p in enumerate(pairs)]
        self.layer = np.concatenate(layers)
        self.before, self.after = (np.concatenate([np.nonzero(p)[side] for p in pairs]) for side in (0, 1))
        self.weight = np.concatenate([p[np.nonzero(p)] for p in pairs])
        self.num_x = self.num_layers * self.n * self.num_ranks

    def solve(self, node_limit: int) -> OptimizeResult:
        """Run HiGHS; its objective is minus the pairs kept."""
        num_z = len(self.weight) * self.num_ranks
        cost = np.concatenate([np.zeros(self.num_x), -np.repeat(self.weight, self.num_ranks)])
        integrality = np.concatenate([np.ones(self.num_x), np.zeros(num_z)])
        upper = np.ones(self.num_x + num_z)
        if (self.sizes == self.sizes[0]).all():
            expert, rank = np.nonzero(np.arange(self.num_ranks) > np.arange(self.n)[:, None])
            upper[self._x(0, expert, rank)] = 0
        return milp(
            cost,
            integrality=integrality,
            bounds=Bounds(0, upper),
            constraints=list(self._constraints()),
            options={"node_limit": node_limit, "mip_rel_gap": 0.0},
        )

    def ranks(self, x: FloatArray) -> list[IntArray]:
        """Read the placement from a solution."""
        table = x[: self.num_x].reshape(self.num_layers, self.n, self.num_ranks)
        return [np.argmax(layer, axis=1).astype(np.int64) for layer in table]

    def _x(self, layer: IntArray | int, expert: IntArray, rank: IntArray) -> IntArray:
        index: IntArray = (layer * self.n + expert) * self.num_ranks + rank
        return index

    def _constraints(self) -> Iterator[LinearConstraint]:
        x = np.arange(self.num_x).reshape(self.num_layers * self.n, self.num_ranks)
        yield self._sums(x, 1, 1)
        by_rank = x.reshape(self.num_layers, self.n, self.num_ranks).swapaxes(1, 2).reshape(-1, self.n)
        sizes = np.tile(self.sizes, self.num_layers)
        yield self._sums(by_rank, sizes, sizes)

        num_pairs = len(self.weight)
        rank = np.tile(np.arange(self.num_ranks), num_pairs)
        z = self.num_x + np.arange(num_pairs * self.num_ranks)
        for layer, expert in ((self.layer, self.before), (self.layer + 1, self.after)):
            end = self._x(np.repeat(layer, self.num_ranks), np.repeat(expert, self.num_ranks), rank)
            rows = np.arange(len(z))
            yield self._rows(len(z), np.r_[rows, rows], np.r_[z, end], np.r_[np.ones(len(z)), -np.ones(len(z))])
            # Sum of z over an expert's neighbours on a rank <= size of the rank * x.
            ends, row = np.unique(end, return_inverse=True)
            values = np.r_[np.ones(len(z)), -self.sizes[ends % self.num_ranks]]
            yield self._rows(len(ends), np.r_[row, np.arange(len(ends))], np.r_[z, ends], values)

    def _rows(self, num_rows: int, row: IntArray, column: IntArray, value: FloatArray) -> LinearConstraint:
        shape = (num_rows, self.num_x + len(self.weight) * self.num_ranks)
        return LinearConstraint(csr_array((value, (row, column)), shape=shape), -np.inf, 0)

    def _sums(self, columns: IntArray, lower: IntArray | int, upper: IntArray | int) -> LinearConstraint:
        """Bound the sum of every row of variables; ``columns``: int64 ``[num_sums, variables per sum]``."""
        row = np.repeat(np.arange(len(columns)), columns.shape[1])
        shape = (len(columns), self.num_x + len(self.weight) * self.num_ranks)
        matrix = csr_array((np.ones(columns.size), (row, columns.ravel())), shape=shape)
        return LinearConstraint(matrix, lower, upper)


def _solve_by_halves(pairs: Sequence[IntArray], sizes: IntArray, node_limit: int) -> Solution:
    """Divide the experts between two halves of the ranks, then every half by itself, and improve the whole.

    Crossings between the halves are crossings, so the first step's lower bound holds for the whole.
    """
    middle = len(sizes) // 2
    parts = (sizes[:middle], sizes[middle:])
    halves = place_by_affinity(pairs, np.array([part.sum() for part in parts]), node_limit)
    ranks = [np.empty(len(half), dtype=np.int64) for half in halves.ranks]
    for side, part in enumerate(parts):
        own = [np.flatnonzero(half == side) for half in halves.ranks]
        inside = [p[np.ix_(a, b)] for p, a, b in zip(pairs, own[:-1], own[1:], strict=True)]
        for layer, placed in enumerate(place_by_affinity(inside, part, node_limit).ranks):
            ranks[layer][own[layer]] = side * middle + placed
    ranks = _improve(pairs, ranks, sizes)
    return Solution(ranks, count_crossings(pairs, ranks), halves.lower_bound)
