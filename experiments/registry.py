"""Finds the components that users may add as one file each, and makes their fields command-line options."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import baselines
import experiments.datasets
import experiments.routers
import harmoeny
import harmoeny.models
from experiments.datasets.base import Dataset
from experiments.routers.base import Router
from harmoeny.models.base import ModelConfig
from harmoeny.policy import Policy, moves_shared


@dataclass(frozen=True)
class Group:
    """A kind of component.

    Attributes:
        base: what its classes derive from.
        packages: where they are looked for, one module each.
        package: where a choice stands in the configuration; ``{name}`` is the component's name.
        description: what the group is for.
    """

    base: type[Any]
    packages: tuple[Any, ...]
    package: str
    description: str


GROUPS = {
    "system": Group(
        Policy, (baselines, harmoeny), "systems.{name}", "what is compared; a list: system=[harmoeny,static_ep]"
    ),
    "model": Group(ModelConfig, (harmoeny.models,), "model", "the model that is run"),
    "dataset": Group(Dataset, (experiments.datasets,), "dataset", "the text that the model reads"),
    "router": Group(Router, (experiments.routers,), "router", "which experts the tokens go to"),
}


#: The choice of all systems that this installation has, but for those that :func:`for_every_model` leaves out.
ALL_SYSTEMS = "all"


def for_every_model(policy: type[Policy]) -> bool:
    """Return whether a system runs any model with the memory that others have: ``system=all`` has those."""
    return not policy.small_memory and not moves_shared(policy)


def discover(group: str) -> tuple[dict[str, type[Any]], dict[str, str]]:
    """Import every module of a group's packages and collect its concrete classes.

    Returns:
        Classes by name, and by module the reason why it could not be imported, which is a missing dependency.

    Raises:
        ValueError: two classes of one name, or a class that is no keyword-only dataclass with a name and a description.
    """
    found: dict[str, type[Any]] = {}
    unavailable: dict[str, str] = {}
    for package in GROUPS[group].packages:
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            if info.ispkg:
                continue
            try:
                module = importlib.import_module(f"{package.__name__}.{info.name}")
            except ImportError as error:
                unavailable[info.name] = str(error)
                continue
            for cls in _concrete_classes(module, GROUPS[group].base):
                if cls.name in found:
                    raise ValueError(f"{group} {cls.name!r} is defined twice: {found[cls.name]} and {cls}")
                found[cls.name] = cls
    return found, unavailable


def _concrete_classes(module: Any, base: type[Any]) -> list[type[Any]]:
    classes = []
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ == module.__name__ and issubclass(cls, base) and not inspect.isabstract(cls):
            # Being a dataclass by inheritance would lose the class's own fields.
            decorated = "__dataclass_params__" in vars(cls)
            if not decorated or not getattr(cls, "name", "") or not getattr(cls, "description", ""):
                raise ValueError(f"{cls.__module__}.{cls.__name__} must be a dataclass with a name and a description")
            classes.append(cls)
    return classes
