"""Which points a multirun has: its sweeper's jobs, each composed and checked once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain, islice
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments.compose.compositions import Compositions
from experiments.compose.cover import PAIRS_SWEEPER, covering_jobs
from experiments.compose.load import Components
from experiments.compose.plugins import chosen_plugin
from experiments.compose.star import STAR_SWEEPER, star_jobs
from experiments.compose.submitted import load_swept_point
from experiments.console import say
from experiments.launch.environment import is_main_rank
from experiments.point.point import Point
from experiments.routers.base import SkippedPoint
from harmoeny.dependencies import require

_ABSENT = object()
#: So many points take seconds to check.
_MANY = 50


def leave_out_absent(config: DictConfig) -> dict[str, str]:
    """Take out of an experiment's own sweep what the components that were chosen instead of its own do not have.

    Args:
        config: the multirun's configuration, with its ``hydra`` node; its ``hydra.sweeper.params`` change.

    Returns:
        By option that is left out, the choice that lacks it, as in ``router=zipf``.

    Raises:
        HydraException: a choice cannot be composed.
    """
    given = parse_overrides(task_overrides(config))
    names = [override.get_key_element() for override in given]
    (jobs,) = _split(given)
    absent = {}
    for option in _own_sweep(config):
        group = option.partition(".")[0]
        if group not in names or option in names:
            continue
        by_choice = {choice: job for job in jobs for choice in job if choice.startswith(f"{group}=")}
        for choice, example in by_choice.items():
            if OmegaConf.select(_compose(config, example), option, default=_ABSENT) is _ABSENT:
                absent[option] = choice
    with read_write(config), open_dict(config):
        for option in absent:
            del config.hydra.sweeper.params[option]
    return absent


def sweep_points(config: DictConfig) -> tuple[list[tuple[Point, dict[str, Any]]], list[str]]:
    """Compose and check all points of a multirun.

    Args:
        config: the multirun's configuration, with its ``hydra`` node.

    Returns:
        Every different point with the values that the sweep gave it, and the names of the swept options.

    Raises:
        ValueError: a point is wrong.
        HydraException: a point cannot be composed.
    """
    given = {override.get_key_element() for override in parse_overrides(task_overrides(config))}
    params = _own_sweep(config)
    parsed = parse_overrides(
        [*task_overrides(config), *(f"{key}={value}" for key, value in params.items() if key not in given)]
    )
    # Every row of a result names its system anyway, so a sweep over lists of systems adds nothing to tell apart.
    axes = [p.get_key_element() for p in parsed if p.is_sweep_override() and p.get_key_element() != "system"]
    points: dict[str, tuple[Point, dict[str, Any]]] = {}
    jobs = Compositions(_loader(), partial(_compose, config))
    components = Components()
    skipped: dict[str, None] = {}
    all_jobs = _jobs(config, parsed)
    if len(all_jobs) > _MANY and is_main_rank():
        say(f"{config.experiment}: checking all {len(all_jobs)} points")
    for job in all_jobs:
        try:
            point = load_swept_point(jobs.compose(job), components)
        except SkippedPoint as reason:
            skipped[str(reason)] = None
            continue
        swept = {override.get_key_element(): override.value() for override in jobs.parse(job)}
        values = {axis: v if isinstance(v := swept[axis], int | float | str | None) else str(v) for axis in axes}
        points.setdefault(point.run_id, (point, values))
    if not points:
        raise SkippedPoint("; ".join(skipped))
    return list(points.values()), axes


def task_overrides(config: DictConfig) -> list[str]:
    """Return the overrides as they were typed; interpolations in them are each point's own."""
    return [str(override) for override in OmegaConf.to_container(config.hydra.overrides.task, resolve=False) or ()]


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Read overrides.

    Raises:
        ValueError: a range without values or without a step, which Hydra would not name.
    """
    parsed = OverridesParser.create(_loader()).parse_overrides(list(overrides))
    for override in parsed:
        _check_values(override)
    return parsed


def _own_sweep(config: DictConfig) -> Mapping[str, Any]:
    """Return what an experiment sweeps of its own: options and their values as overrides spell them."""
    params: Mapping[str, Any] | None = OmegaConf.select(config, "hydra.sweeper.params")
    return params or {}


def _jobs(config: DictConfig, parsed: list[Override]) -> list[list[str]]:
    """Return the jobs that the sweep's sweeper makes."""
    # The sweeper itself is Hydra's to make: it loads plugins anew, so that their classes are not those imported here.
    sweeper = chosen_plugin(config, "sweeper")
    if sweeper == PAIRS_SWEEPER:
        return covering_jobs(parsed, config.hydra.sweeper.points, config.hydra.sweeper.also)
    if sweeper == STAR_SWEEPER:
        return star_jobs(parsed, config.hydra.sweeper.centres)
    return list(chain.from_iterable(_split(parsed)))


def _split(parsed: list[Override]) -> list[list[list[str]]]:
    """Return the jobs of a sweep in batches, as Hydra itself makes them."""
    check_hydra()
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, None)
    return batches


@cache
def check_hydra() -> None:
    """Refuse releases of Hydra that split a sweep into jobs in another way.

    Raises:
        DependencyError: ``BasicSweeper.split_arguments``, which is not documented, is not as it was.
    """
    arguments = list(inspect.signature(BasicSweeper.split_arguments).parameters)
    holds = arguments == ["overrides", "max_batch_size"]
    require("hydra-core", "BasicSweeper.split_arguments must take overrides and max_batch_size", holds=holds)


def _check_values(override: Override) -> None:
    try:
        empty = override.is_sweep_override() and not list(islice(override.sweep_string_iterator(), 1))
    except ValueError as error:
        raise ValueError(f"{override.input_line}: {error}") from error
    if empty:
        raise ValueError(f"{override.input_line}, must have at least one value")


def _compose(config: DictConfig, overrides: list[str]) -> DictConfig:
    return _loader().load_sweep_config(config, overrides)


def _loader() -> ConfigLoader:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "callbacks run inside Hydra"
    return hydra.config_loader
