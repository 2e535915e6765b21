from itertools import combinations, product

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments.compose.cover import cover_pairs, covering_jobs


def pairs_of(rows: np.ndarray) -> set[tuple[int, int, int, int]]:
    return {
        (one, int(row[one]), other, int(row[other]))
        for row in rows
        for one, other in combinations(range(rows.shape[1]), 2)
    }


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 60))
def test_every_pair_of_values_is_covered_by_as_few_points_as_asked_for(sizes: list[int], points: int) -> None:
    grid = np.array(list(product(*map(range, sizes))))
    chosen = cover_pairs(grid, points)
    assert pairs_of(grid[chosen]) == pairs_of(grid)
    assert chosen == sorted(set(chosen))
    assert len(chosen) >= min(points, len(grid))
    # No fewer points can have all pairs of the two longest axes; greedily there are not many more.
    two = sorted(sizes)[-2:]
    assert len(chosen) <= max(points, 2 * int(np.prod(two)))


def test_further_points_have_all_values_about_equally_often() -> None:
    grid = np.array(list(product(range(4), range(3), range(4), range(6), range(3))))
    chosen = grid[cover_pairs(grid, 150)]
    assert len(chosen) == 150
    for column, size in enumerate((4, 3, 4, 6, 3)):
        number = np.bincount(chosen[:, column], minlength=size)
        assert number.max() - number.min() <= 3


def test_which_points_are_chosen_does_not_depend_on_the_order_of_options() -> None:
    parse = OverridesParser.create().parse_overrides
    one = covering_jobs(parse(["seed=1", "a=x,y,z", "b=1,2,3", "c=p,q"]), 1)
    other = covering_jobs(parse(["c=q,p", "b=3,1,2", "a=z,x,y", "seed=1"]), 1)
    assert {frozenset(job) for job in one} == {frozenset(job) for job in other}
    assert 9 <= len(one) <= 11


def test_every_point_comes_with_the_one_that_it_is_compared_with() -> None:
    parsed = OverridesParser.create().parse_overrides(["seed=1", "a=x,y,z", "b=1,2,3", "c=p,q"])
    alone, beside = ({tuple(job) for job in covering_jobs(parsed, 1, also)} for also in (None, "a=y"))
    assert alone | {(seed, "a=y", *rest) for seed, _, *rest in alone} == beside
    assert len(beside) > len(alone)
    narrowed = OverridesParser.create().parse_overrides(["a=x,z", "b=1,2"])
    assert covering_jobs(narrowed, 1, "a=y") == covering_jobs(narrowed, 1), "the grid has no such value"


@pytest.mark.parametrize("also", ["a", "a=", "=1"])
def test_what_is_no_setting_is_refused(also: str) -> None:
    with pytest.raises(ValueError, match=r"hydra\.sweeper\.also: .*, must be option=value or null"):
        covering_jobs(OverridesParser.create().parse_overrides(["a=1,2"]), 1, also)


def test_a_number_of_points_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hydra\.sweeper\.points: 0, must be at least 1"):
        covering_jobs(OverridesParser.create().parse_overrides(["a=1,2"]), 0)
