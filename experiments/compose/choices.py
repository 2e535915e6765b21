"""Overrides that choose of a group, checked before Hydra reads them: it fails on values that are no names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from experiments.compose.help import choices, groups


def check_choices(arguments: Sequence[str]) -> None:
    """Refuse overrides such as ``system=3`` or ``model=[[a]]``; what cannot be read at all is left to Hydra.

    Args:
        arguments: of the command line, flags included.

    Raises:
        ValueError: the group, its value and what is allowed.
    """
    parser, names = OverridesParser.create(), groups()
    for argument in arguments:
        try:
            (override,) = parser.parse_overrides([argument])
        except HydraException:
            continue
        if not override.key_or_group:
            raise ValueError(f"{argument!r} cannot be read (there is no name), must be FIELD=VALUE or GROUP=CHOICE")
        if override.key_or_group in names and not override.is_delete():
            _check(override)


def _check(override: Override) -> None:
    group = override.key_or_group
    for value in _values(override):
        chosen = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and "${" not in name for name in chosen):
            raise ValueError(f"{group}: {value!r}, must be one of {', '.join(choices(group))}")


def _values(override: Override) -> Iterator[Any]:
    if override.is_sweep_override():
        yield from override.sweep_iterator(transformer=Transformer.identity)
    else:
        yield override.value()
