"""From a composed configuration to a checked point: build its components, then check everything before ranks start."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.backends import backend_named
from experiments.compose.checks import check_names, check_point
from experiments.compose.messages import explain
from experiments.datasets.base import Dataset
from experiments.point.options import Options, make_options
from experiments.point.point import Point
from experiments.point.simulator_options import load_options
from experiments.routers.base import Router
from harmoeny.hardware import Hardware
from harmoeny.models.base import ModelConfig
from harmoeny.policy import Policy

_COMPONENTS: dict[str, type[Any]] = {"model": ModelConfig, "dataset": Dataset, "router": Router, "hardware": Hardware}


class Components:
    """Components by their configuration: each is built once, and whoever asks gets a copy of its own."""

    def __init__(self) -> None:
        self._built: dict[tuple[type[Any], str], Any] = {}

    def build(self, base: type[Any], field_name: str, node: Any) -> Any:
        """Return the component that a resolved node describes.

        Raises:
            ValueError: it describes none, or one that is no ``base``.
        """
        key = (base, repr(node))
        if key not in self._built:
            self._built[key] = _build(base, field_name, node)
        return copy.deepcopy(self._built[key])


def load_point(
    config: DictConfig | Mapping[str, Any], *, here: bool = True, components: Components | None = None
) -> Point:
    """Check a configuration completely, before any worker starts.

    Args:
        config: the configuration.
        here: whether this host, and the ranks that were started on it, will run it; another may have other devices.
        components: what was built for other points; to instantiate them takes most of the time.

    Raises:
        ValueError: the first field that is wrong, its value and what is allowed.
    """
    try:
        values = _resolved(config)
        build = (components or Components()).build
        parts = {name: build(base, name, values[name]) for name, base in _COMPONENTS.items()}
        parts |= {name: parts[name].resolved() for name in ("model", "hardware")}
        systems = {name: build(Policy, f"systems.{name}", node) for name, node in values["systems"].items()}
        simulator = load_options(values["simulator"])
        options = make_options(values)
        systems = {name: _with_room(policy, options, parts["model"]) for name, policy in systems.items()}
        backend = backend_named(options.backend)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    except OSError as error:
        raise _unusable(error, config) from error
    point = Point(options=options, simulated=backend.simulated, systems=systems, simulator=simulator, **parts)
    try:
        check_point(point)
        check_names(point)
    except OSError as error:
        raise _unusable(error, config) from error
    if here:
        backend.check_host(point)
    return point


def _with_room(policy: Policy, options: Options, model: ModelConfig) -> Policy:
    """Return a policy with the room for experts that all systems of the point have, where it says so."""
    if options.num_slots is not None:
        if options.spare_slots is not None:
            raise ValueError(f"num_slots: {options.num_slots}, must be null with spare_slots={options.spare_slots}")
        if options.num_slots < 1:
            raise ValueError(f"num_slots: {options.num_slots}, must be at least 1, or null")
        return replace(policy, num_slots=options.num_slots)
    if options.spare_slots is None:
        return policy
    if options.spare_slots < 0:
        raise ValueError(f"spare_slots: {options.spare_slots}, must be at least 0, or null")
    if options.world_size < 1:
        return policy  # refused later
    return policy.with_spare_slots(options.spare_slots, model.num_experts, options.world_size)


def _unusable(error: OSError, config: DictConfig | Mapping[str, Any]) -> ValueError:
    """Return an error that names the option whose path the system refuses, as one longer than it allows."""
    name = next((name for name, value in _leaves(_resolved(config)) if value == error.filename), None)
    return ValueError(
        explain(error) if name is None else f"{name}: {error.filename!r} cannot be used ({error.strerror})"
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return all values as plain data, without Hydra's own."""
    # A DictConfig's types hold for what interpolations give, too.
    own = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    values = {str(key): _plain(own[key]) for key in own if key != "hydra"}
    _check_fields(values)
    if not isinstance(values["systems"], Mapping):  # an interpolation may give anything
        raise ValueError(f"systems: {values['systems']!r}, must be systems by name")
    return values


def _plain(value: Any) -> Any:
    is_config = OmegaConf.is_config(value)
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_config else value


def _check_fields(values: Mapping[str, Any]) -> None:
    """Refuse what ``+FIELD=`` added and ``~FIELD`` took away: nobody would read the one or do without the other."""
    names = [option.name for option in fields(Options)]
    for name in values:
        if name not in names:
            raise ValueError(f"{name}: no such field, must be one of {', '.join(names)}")
    for name in names:
        if name not in values:
            raise ValueError(f"{name}: missing, must be set")
    for name, value in _leaves(values):
        if isinstance(value, str) and _has_lone_bytes(value):
            raise ValueError(f"{name}: {value!r}, must be text in UTF-8 (PYTHONUTF8=1 reads it so)")


def _has_lone_bytes(text: str) -> bool:
    """Tell whether a text has bytes that the command line's encoding could not read; no file of results takes them."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _build(base: type[Any], field_name: str, node: Any) -> Any:
    try:
        component = instantiate(node, _convert_="all")
    except HydraException as error:
        raise ValueError(f"{field_name}: {explain(error)}") from error
    if not isinstance(component, base):
        raise ValueError(f"{field_name}: {node!r}, must be a {base.__name__}; python run.py --help lists them")
    return component
