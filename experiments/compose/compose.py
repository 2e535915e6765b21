"""Composes points outside Hydra's own entry point, for scripts and tests."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir

from experiments.compose.help import CONF
from experiments.compose.load import load_point
from experiments.compose.schema import register_options
from experiments.point.point import Point


def compose_point(*overrides: str) -> Point:
    """Return one point of the configuration, as ``python run.py OVERRIDES`` would run it.

    Raises:
        ValueError: the configuration is wrong.
    """
    _register_once()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_point(compose("config", list(overrides)))


@cache
def _register_once() -> None:
    register_options()
