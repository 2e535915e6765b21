"""What Hydra and OmegaConf work out anew in every composition, once for all tests: nine tenths of composing's time."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra._internal.config_loader_impl as config_loader
import omegaconf._utils
import omegaconf.base
import pytest
import yaml
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides, _create_interpolation_map, create_defaults_list
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, grammar_parser

from experiments.point.copies import Copies

_CONF = Path(__file__).resolve().parent.parent / "conf"


@contextmanager
def nothing_twice() -> Iterator[None]:
    """Read no YAML text, parse no value and merge no choices of groups a second time, in this block.

    Hydra imports its sources of configurations anew: what they call is replaced, as their own methods come back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(_remembered(OmegaConf.load, _quick_loader())))
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", cache(grammar_parser.parse))
        patch.setattr(defaults_list, "_create_interpolation_map", _names_where_needed)
        chosen = _Chosen()
        patch.setattr(config_loader, "create_defaults_list", chosen.defaults)
        patch.setattr(
            ConfigLoaderImpl,
            "_compose_config_from_defaults_list",
            lambda loader, **named: chosen.config(loader, **named),
        )
        yield


def _names_where_needed(overrides: Overrides, defaults: list[Any], self_added: bool) -> DictConfig:
    """Return what interpolations in a list of defaults may name, which only a list that has some is asked for."""
    needed = any("${" in str(vars(default)) for default in defaults)
    return _create_interpolation_map(overrides, defaults, self_added) if needed else DictConfig({})


class _Merged(list[Any]):
    """A list of defaults with a name for what they were merged into, and where they are read from."""

    def __init__(self, defaults: list[Any], key: Hashable, sources: Hashable) -> None:
        super().__init__(defaults)
        self.key, self.sources = key, sources


class _Loader:
    """Loads each configuration once, in place of Hydra's loader: one that is given first, then copies of files'.

    Args:
        loader: Hydra's.
        first: in place of a file; None: there is none.
        known: what was loaded before, by what asks for it.
    """

    def __init__(self, loader: ConfigLoaderImpl, first: DictConfig | None, known: dict[str, Copies]) -> None:
        self._loader, self._first, self._known = loader, first, known

    def _load_single_config(self, *, default: Any, repo: Any) -> Any:
        if default is None:
            return SimpleNamespace(config=self._first)
        key = repr(default)
        if key not in self._known:
            self._known[key] = Copies(self._loader._load_single_config(default=default, repo=repo).config)
        return SimpleNamespace(config=self._known[key].copy())


class _Read:
    """A repository of Hydra's that reads no file twice, for those who change nothing of what they get."""

    def __init__(self, repo: Any, known: dict[str, Any]) -> None:
        self._repo, self._known = repo, known

    def load_config(self, config_path: str) -> Any:
        if config_path not in self._known and (found := self._repo.load_config(config_path=config_path)) is not None:
            self._known[config_path] = found
        return self._known.get(config_path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repo, name)


class _Chosen:
    """What the chosen files and schemas hold together, before values are set; of conf/ only, which no test changes."""

    def __init__(self) -> None:
        self._lists: dict[Hashable, tuple[list[Any], dict[str, Any]]] = {}
        self._configs: dict[Hashable, Copies] = {}
        self._read: defaultdict[Hashable, dict[str, Any]] = defaultdict(dict)
        self._loaded: defaultdict[Hashable, dict[str, Copies]] = defaultdict(dict)
        self._schemas: list[Any] = []
        self._merge = ConfigLoaderImpl._compose_config_from_defaults_list

    def defaults(self, *, repo: Any, overrides_list: list[Override], **named: Any) -> DefaultsList:
        """Return what Hydra's own `create_defaults_list` does."""
        sources = tuple((source.scheme(), source.path) for source in repo.get_sources())
        if any(scheme == "file" and Path(path) != _CONF for scheme, path in sources):
            return create_defaults_list(repo=repo, overrides_list=overrides_list, **named)
        self._look_at_schemas()
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        choices = [o.input_line for o in overrides_list if not o.is_sweep_override() and o not in values]
        key = (sources, *choices, *sorted(named.items()))
        if key not in self._lists:
            read: Any = _Read(repo, self._read[sources])
            made = create_defaults_list(repo=read, overrides_list=overrides_list, **named)
            self._lists[key] = (made.defaults, made.overrides.known_choices)
        defaults, known = self._lists[key]
        overrides: Any = SimpleNamespace(known_choices=dict(known))
        tree: Any = None  # which only --info shows
        return DefaultsList(_Merged(defaults, key, sources), tree, values, overrides)

    def config(self, loader: ConfigLoaderImpl, *, defaults: list[Any], repo: Any) -> DictConfig:
        """Return what Hydra's own `_compose_config_from_defaults_list` does."""
        if not isinstance(defaults, _Merged):
            return self._merge(loader, defaults=defaults, repo=repo)
        if defaults.key not in self._configs:
            config = self._merged(loader, defaults, repo)
            self._configs[defaults.key] = Copies(config)
            return config
        return self._configs[defaults.key].copy()

    def _merged(self, loader: ConfigLoaderImpl, defaults: _Merged, repo: Any) -> DictConfig:
        """Merge onto what most lists begin with: all of Hydra's own, and our schema."""
        known = self._loaded[defaults.sources]
        number = next((i + 1 for i, default in enumerate(defaults) if default.config_path == "schema"), 0)
        begin = (defaults.sources, *map(repr, defaults[:number]))
        if begin not in self._configs:
            first: Any = _Loader(loader, None, known)
            self._configs[begin] = Copies(self._merge(first, defaults=defaults[:number], repo=repo))
        onto: Any = _Loader(loader, self._configs[begin].copy(), known)
        rest: list[Any] = [None, *defaults[number:]]
        return self._merge(onto, defaults=rest, repo=repo)

    def _look_at_schemas(self) -> None:
        """Forget everything where tests have registered others."""
        schemas = list(_schemas(ConfigStore.instance().repo))
        if schemas != self._schemas:
            for known in (self._lists, self._configs, self._read, self._loaded):
                known.clear()
            self._schemas = schemas


def _schemas(stored: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield what tells schemas apart that are registered with Hydra."""
    for name, value in stored.items():
        if isinstance(value, dict):
            yield (name,)
            yield from _schemas(value)
        else:
            cls = OmegaConf.get_type(value.node)
            yield name, value.package, cls, tuple(value.node) if cls is dict else ()


def _quick_loader() -> Any:
    """Return OmegaConf's loader over libyaml's parser, which takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return omegaconf._utils.get_yaml_loader()


def _remembered(load: Callable[[Any], Any], loader: Any) -> Callable[[Any], Any]:
    results: dict[str | bytes, bytes] = {}

    def loaded(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in results:
            try:
                results[text] = pickle.dumps(OmegaConf.create(yaml.load(text, Loader=loader) or {}))
            except yaml.YAMLError:
                return load(io.StringIO(text))  # which says what is wrong in the words that users read
        return pickle.loads(results[text])  # a third of the time of a deep copy

    return loaded
