"""Configurations that differ in values only: composed once, with their values set in a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.help import groups
from experiments.point.copies import Copies


class Compositions:
    """Composes as Hydra does, which sets values last: overrides that differ in nothing else share all the rest.

    Args:
        loader: Hydra's.
        compose: composes a configuration of overrides from scratch.
    """

    def __init__(self, loader: ConfigLoader, compose: Callable[[list[str]], DictConfig]) -> None:
        self._compose, self._parser, self._groups = compose, OverridesParser.create(loader), groups()
        self._composed: dict[tuple[str | None, ...], Copies] = {}
        self._parsed: dict[str, Override] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Read overrides, each once; whoever asks gets the same ones.

        Raises:
            HydraException: one is not written as overrides are.
        """
        for override in overrides:
            if override not in self._parsed:
                (self._parsed[override],) = self._parser.parse_overrides([override])
        return [self._parsed[override] for override in overrides]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return a configuration; what its ``hydra`` node says of the overrides may be another's.

        Raises:
            HydraException: it cannot be composed.
        """
        parsed = self.parse(overrides)
        values = [override for override in parsed if self._sets_value(override)]
        setting = [override for override in parsed if override.key_or_group not in self._groups]  # after all choices
        if len(set(overrides)) < len(overrides) or any(
            _meet(value, other) for value in values for other in setting if other is not value
        ):
            return self._compose(list(overrides))  # their order matters
        rest = tuple(override.input_line for override in parsed if override not in values)
        key = (*rest, *(value.key_or_group for value in values))
        if key in self._composed:
            try:
                return _with_values(self._composed[key].copy(), values)
            except OmegaConfBaseException:
                return self._compose(list(overrides))  # Hydra's own error says more
        config = self._compose(list(overrides))
        self._composed[key] = Copies(config)
        return config

    def _sets_value(self, override: Override) -> bool:
        """Tell whether an override does no more than to set a number, a text or nothing, and chooses no group."""
        name = override.key_or_group
        plain = override.type == OverrideType.CHANGE and override.package is None and name not in self._groups
        return plain and not name.startswith("hydra") and isinstance(override.value(), int | float | str | None)


def _meet(one: Override, other: Override) -> bool:
    """Tell whether one override sets what another sets, or a part of it."""
    a, b = (f"{override.key_or_group}." for override in (one, other))
    return a.startswith(b) or b.startswith(a)


def _with_values(config: DictConfig, values: Sequence[Override]) -> DictConfig:
    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    return config
