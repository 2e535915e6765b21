"""Makes the configuration known to Hydra: its schema, the components as choices, and the help text about them."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from experiments.compose.help import help_text
from experiments.point.options import Options
from experiments.point.simulator_options import SimulatorOptions
from experiments.registry import ALL_SYSTEMS, GROUPS, discover, for_every_model
from harmoeny.hardware import Hardware

#: By component: Hydra merges two choices of one component only where their schemas are the same class.
_SCHEMAS: dict[type[Any], type[Any]] = {}


def register_options() -> None:
    """Store everything that conf/config.yaml refers to; call it before Hydra composes."""
    ConfigStore.instance().store(name="schema", node=Options)
    register_components()
    OmegaConf.register_new_resolver("help_on_choices", help_text, replace=True)
    # Hydra copies all options for every group that --help lists and for every composition, only to read the copy.
    ConfigStore.__deepcopy__ = _itself  # type: ignore[attr-defined]


def _itself(store: ConfigStore, _: dict[int, Any]) -> ConfigStore:
    return store


def _options(cls: type[Any]) -> type[Any]:
    """Return the schema of a dataclass's options: its fields, and the class to build of them."""
    if cls not in _SCHEMAS:
        _SCHEMAS[cls] = _make_options(cls)
    return _SCHEMAS[cls]


def _make_options(cls: type[Any]) -> type[Any]:
    hints = get_type_hints(cls)  # resolves annotations that are kept as strings
    return dataclasses.make_dataclass(
        f"{cls.__name__}Options",
        [
            ("_target_", str, dataclasses.field(default=f"{cls.__module__}.{cls.__qualname__}")),
            *((f.name, hints[f.name], f) for f in dataclasses.fields(cls)),
        ],
        kw_only=True,
    )


def _order(item: tuple[str, type[Any]]) -> tuple[bool, bool, bool, str]:
    """Order systems: ours, then exact baselines, then those that drop tokens, then bounds."""
    name, policy = item
    return policy.bound, not policy.exact, policy.baseline, name


def register_components() -> None:
    """Store every component's fields, with their types and defaults, as a choice of its Hydra group."""
    for group, description in GROUPS.items():
        for name, cls in discover(group)[0].items():
            ConfigStore.instance().store(
                name=name, group=group, node=_options(cls), package=description.package.format(name=name)
            )
    ConfigStore.instance().store(
        name=ALL_SYSTEMS,
        group="system",
        node={
            name: _options(cls)
            for name, cls in sorted(discover("system")[0].items(), key=_order)
            if for_every_model(cls)
        },
        package="systems",
    )
    ConfigStore.instance().store(name="measured", group="hardware", node=_options(Hardware), package="hardware")
    ConfigStore.instance().store(
        name="runtime",
        group="simulator",
        node={f.name: {} for f in dataclasses.fields(SimulatorOptions)},
        package="simulator",
    )
