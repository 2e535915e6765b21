"""What Hydra and OmegaConf work out anew in every composition, once for all tests: half of the time of composing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import omegaconf.base
import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from omegaconf import grammar_parser


@contextmanager
def nothing_twice() -> Iterator[None]:
    """Copy no store, read no unchanged file of conf/ and parse no value a second time, in this block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)  # it is only read
        patch.setattr(FileConfigSource, "load_config", _remembered(FileConfigSource.load_config))
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", cache(grammar_parser.parse))
        yield


def _remembered(load_config: Callable[[FileConfigSource, str], Any]) -> Callable[[FileConfigSource, str], Any]:
    results: dict[tuple[str, str, bytes], Any] = {}

    def load(source: FileConfigSource, config_path: str) -> Any:
        file = Path(source.path, source._normalize_file_name(config_path))
        if not file.is_file():
            return load_config(source, config_path)  # which says so
        key = (source.provider, str(file), file.read_bytes())
        if key not in results:
            results[key] = load_config(source, config_path)
        return copy.deepcopy(results[key])

    return load
