"""The worked policy of docs/extending.md is one: it keeps what every policy must, in the real runtime too."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from experiments.choices import CONF
from harmoeny.placement import place
from tests.harmoeny.runtime.cases import random_tokens
from tests.harmoeny.runtime.test_engine import run_layers

PAGE = CONF.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def scatter() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    module = ModuleType("scatter_of_the_docs")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    yield module.__dict__["Scatter"]
    del sys.modules[module.__name__]


def test_it_plans_what_its_docstring_says(scatter: Any) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (4, 6))
    placement = place("contiguous", 6, 4)
    plan = scatter(stride=3).plan(counts, placement)
    plan.validate(counts, placement)
    for expert in range(6):
        assert (plan.tokens[:, expert, expert * 3 % 4] == counts[:, expert]).all()


def test_it_refuses_what_it_cannot_do(scatter: Any) -> None:
    with pytest.raises(ValueError, match="stride: 0, must be at least 1"):
        scatter(stride=0).validate()


def test_it_is_exact_in_the_runtime(scatter: Any) -> None:
    tokens = [[random_tokens(rank, 12, 6, 2) for rank in range(3)] for _ in range(2)]
    run_layers(3, scatter(), tokens, num_experts=6)


def test_it_lies_where_the_page_says() -> None:
    assert "baselines/scatter.py" in PAGE.read_text(encoding="utf-8")
    assert not Path(CONF.parent, "baselines", "scatter.py").exists()
