"""Typed options: points that are written alike share nothing that could be changed."""

from dataclasses import fields

import pytest
from omegaconf.errors import OmegaConfBaseException

from experiments.point.options import Options, make_options
from tests.conftest import Load


def test_options_of_two_points_are_equal_and_change_apart(load: Load) -> None:
    options = load().options
    values = {field.name: getattr(options, field.name) for field in fields(Options)}
    values |= {name: dict(vars(values[name])) for name in ("requests", "slo", "trace", "wandb")}
    one, other = make_options(values), make_options(values)
    assert one == other == options
    one.slo.share = 0.5
    assert other.slo.share == make_options(values).slo.share == options.slo.share
    assert type(make_options(values | {"until": 1}).until) is float
    with pytest.raises(OmegaConfBaseException, match="'x' of type 'str' could not be converted to Integer"):
        make_options(values | {"seed": "x"})
    with pytest.raises(OmegaConfBaseException, match="nonsense"):
        make_options(values | {"nonsense": 1})
