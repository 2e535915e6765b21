"""What Hydra and OmegaConf work out anew in every composition, once for all tests: half of the time of composing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import omegaconf._utils
import omegaconf.base
import pytest
import yaml
from omegaconf import OmegaConf, grammar_parser


@contextmanager
def nothing_twice() -> Iterator[None]:
    """Read no YAML text and parse no value a second time, in this block.

    Hydra imports its sources of configurations anew: what they call is replaced, as their own methods come back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(_remembered(OmegaConf.load, _quick_loader())))
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", cache(grammar_parser.parse))
        yield


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
