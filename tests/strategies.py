"""What tests with hypothesis share: how many examples they try, and counts and placements of every awkward shape."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from harmoeny.placement import PLACEMENTS, BoolArray, IntArray, Placement, place


def examples(number: int = 100, **others: Any) -> settings:
    """Let a test try so many examples; under the profile `quick` its share of them, though at least five.

    Args:
        number: of examples; without a profile, all are tried.
        others: of hypothesis' settings.
    """
    return settings(deadline=None, max_examples=min(number, max(5, share_of(number))), **others)


def share_of(number: int) -> int:
    """Return how many of so many examples the profile tries: `quick` a tenth of them, all others each."""
    return round(number * settings().max_examples / 100)


def is_quick() -> bool:
    """Return whether the profile is `quick`, as in `make check`."""
    return share_of(100) < 100


def few_points(config: DictConfig) -> None:
    """Under the profile `quick`, leave two values of everything that is swept, of a grid only its pairs."""
    if is_quick():
        few_values(config, 2)


def few_values(config: DictConfig, number: int) -> None:
    """Leave the first values, so many, of everything that a multirun sweeps; of a grid only its pairs."""
    sweeper, typed = config.hydra.sweeper, OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    config.hydra.overrides.task = [_first_values(str(override), number) for override in typed]
    for name, values in dict(sweeper.params or {}).items():
        sweeper.params[name] = _first_values(f"{name}={values}", number).partition("=")[2]
    if sweeper.get("points"):
        sweeper.update(points=1, also=None)


def _first_values(typed: str, number: int) -> str:
    override = OverridesParser.create().parse_override(typed)
    if not override.is_sweep_override():
        return typed
    values = islice(override.sweep_string_iterator(), number)
    return f"{override.get_key_element()}={','.join(values)}"


COUNT_KINDS = ("spread", "sparse", "zipf", "one_expert", "one_sender", "zero_rows", "ones", "none")


def make_counts(kind: str, world_size: int, num_experts: int, max_tokens: int, rng: np.random.Generator) -> IntArray:
    """Return int64 ``[world_size, num_experts]``; ``max_tokens`` bounds a cell, except where one takes a whole row."""
    shape = (world_size, num_experts)
    counts = rng.integers(0, max_tokens, shape, endpoint=True)
    if kind == "sparse":
        counts *= rng.random(shape) < 0.2
    elif kind == "zipf":
        popularity = np.arange(1, num_experts + 1) ** -1.5
        shares = np.stack([rng.permutation(popularity / popularity.sum()) for _ in range(world_size)])
        counts = rng.multinomial(max_tokens * num_experts, shares)
    elif kind == "one_expert":
        counts[:] = 0
        counts[:, rng.integers(num_experts)] = max_tokens * num_experts
    elif kind == "one_sender":
        counts *= (np.arange(world_size) == rng.integers(world_size))[:, None]
    elif kind == "zero_rows":
        counts *= (rng.random(world_size) < 0.5)[:, None]
    elif kind == "ones":
        counts = rng.integers(0, 1, shape, endpoint=True)
    elif kind == "none":
        counts[:] = 0
    return np.ascontiguousarray(counts, dtype=np.int64)


@st.composite
def counts_arrays(draw: st.DrawFn, max_world_size: int = 16, max_experts: int = 64, max_tokens: int = 4096) -> IntArray:
    """Draw int64 ``[world_size, num_experts]``."""
    world_size = draw(st.integers(1, max_world_size), label="world_size")
    num_experts = draw(st.integers(1, max_experts), label="num_experts")
    kind = draw(st.sampled_from(COUNT_KINDS), label="kind")
    tokens = draw(st.integers(1, max_tokens), label="max_tokens")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    return make_counts(kind, world_size, num_experts, tokens, np.random.default_rng(seed))


def even_load(total: int, world_size: int) -> int:
    """Return the least possible largest load: ``total`` assignments over ``world_size`` ranks, rounded up."""
    return -(-total // world_size)


def scattered(num_experts: int, world_size: int, seed: int) -> Placement:
    """Place experts at random, about one in eight also where it is not at home; some ranks may hold none."""
    rng = np.random.default_rng(seed)
    home = rng.integers(0, world_size, num_experts)
    resident: BoolArray = rng.random((num_experts, world_size)) < 0.125
    resident[np.arange(num_experts), home] = True
    return Placement(home=home, resident=resident)


@st.composite
def placements(draw: st.DrawFn, num_experts: int, world_size: int) -> Placement:
    """Draw a regular placement, or one at random with replicas."""
    kind = draw(st.sampled_from((*PLACEMENTS, "scattered")), label="placement")
    if kind == "scattered":
        return scattered(num_experts, world_size, draw(st.integers(0, 2**32 - 1), label="placement seed"))
    return place(kind, num_experts, world_size)


@st.composite
def batches(
    draw: st.DrawFn, max_world_size: int = 16, max_experts: int = 64, max_tokens: int = 4096
) -> tuple[IntArray, Placement]:
    """Draw counts and a placement that they fit."""
    counts = draw(counts_arrays(max_world_size, max_experts, max_tokens))
    return counts, draw(placements(counts.shape[1], counts.shape[0]))
