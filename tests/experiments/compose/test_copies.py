"""Copies of a configuration are what deep copies are, and what tests remember of Hydra is what Hydra makes."""

from __future__ import annotations

import copy

import pytest
from hydra._internal.defaults_list import create_defaults_list
from omegaconf import OmegaConf, ValidationError

from experiments.point.copies import Copies
from tests.conftest import Compose

CHOICES = [
    (),
    ("experiment=smoke", "router=zipf"),
    ("experiment=smoke", "system=[harmoeny,static_ep]", "rounds=3"),
    ("experiment=skew_sweep", "+systems.other=${systems.harmoeny}", "hydra/launcher=cores"),
]


def test_a_copy_is_equal_has_the_same_types_and_shares_nothing(compose: Compose) -> None:
    config = compose("experiment=smoke", "system=[harmoeny]", multirun=True)
    copies = Copies(config)
    one, other = copies.copy(), copies.copy()
    assert one == other == copy.deepcopy(config)
    assert OmegaConf.get_type(one.systems.harmoeny) is OmegaConf.get_type(config.systems.harmoeny)
    one.systems.harmoeny.num_slots = 7
    assert other == config != one
    with pytest.raises(ValidationError, match="rounds"):
        one.rounds = "many"


def test_what_is_not_merged_twice_is_what_hydra_merges(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = [[compose(*choices, multirun=True) for choices in CHOICES] for _ in range(2)]
    monkeypatch.setattr("hydra._internal.config_loader_impl.create_defaults_list", create_defaults_list)
    anew = [compose(*choices, multirun=True) for choices in CHOICES]
    for choices, *made in zip(CHOICES, anew, *remembered, strict=True):
        assert made[0] == made[1] == made[2], choices
    assert len({OmegaConf.to_yaml(config) for config in anew}) == len(CHOICES)
