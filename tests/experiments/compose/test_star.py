from __future__ import annotations

from itertools import product

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hypothesis import given
from hypothesis import strategies as st

from experiments.compose.star import star_jobs


def parsed(*words: str) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def test_one_option_at_a_time_leaves_the_middle() -> None:
    jobs = star_jobs(parsed("fixed=7", "a=1,2,3", "b=x,y", "c=0,5"), {"a": 2})
    assert [job[1:] for job in jobs] == [
        ["a=1", "b=x", "c=0"], ["a=1", "b=x", "c=5"], ["a=1", "b=y", "c=0"],
        ["a=2", "b=x", "c=0"], ["a=2", "b=x", "c=5"], ["a=2", "b=y", "c=0"],
        ["a=3", "b=x", "c=0"],
    ]  # fmt: skip
    assert {job[0] for job in jobs} == {"fixed=7"}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4))
def test_jobs_are_those_of_the_grid_by_their_definition(axes: list[tuple[int, int]]) -> None:
    words = [f"o{i}={','.join(map(str, range(size)))}" for i, (size, _) in enumerate(axes)]
    jobs = star_jobs(parsed(*words), {f"o{i}": centre for i, (_, centre) in enumerate(axes)})
    grid = product(*(range(size) for size, _ in axes))
    # A single value is no sweep, and part of the middle either way.
    wanted = [p for p in grid if sum(v >= centre for v, (_, centre) in zip(p, axes, strict=True)) <= 1]
    assert [[int(o.partition("=")[2]) for o in job] for job in jobs] == [list(p) for p in wanted]


def test_a_middle_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hydra\.sweeper\.centres\.a: 0, must be at least 1"):
        star_jobs(parsed("a=1,2"), {"a": 0})
