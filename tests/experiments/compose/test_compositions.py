"""Configurations that share what is composed are what Hydra makes of each by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from experiments.compose.compositions import Compositions
from tests.conftest import Compose


def content(config: DictConfig) -> dict[str, Any]:
    """Return what a point is made of: all but Hydra's own node."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    del values["hydra"]
    return dict(values)


@pytest.mark.many
@pytest.mark.parametrize(
    "overrides",
    [
        ["router=skew,uniform", "system=[harmoeny]", "seed=1,2"],
        ["systems.harmoeny.num_slots=null,8", "tag='${router.skew}-x'"],
        ["router.skew=0,0.5", "+systems.other=${systems.harmoeny}", "~tag"],
        ["systems.harmoeny.num_slots=4,8", "systems.harmoeny={num_slots:16}"],
        ["systems.harmoeny={num_slots:16,fetch:sync}", "systems.harmoeny.num_slots=4,8"],
        ["router.skew=0,0.5", "model=moe_stack,switch_mini", "router=skew", "model.top_k=1", "seed=1"],
    ],
)
def test_every_job_is_what_hydra_makes_of_it(overrides: list[str], compose: Compose) -> None:
    config = compose("experiment=smoke", multirun=True)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    (jobs,) = BasicSweeper.split_arguments(
        OverridesParser.create(hydra.config_loader).parse_overrides(["experiment=smoke", *overrides]), None
    )
    assert len(jobs) > 1
    composed = Compositions(hydra.config_loader, partial(hydra.config_loader.load_sweep_config, config))
    for job in jobs:
        assert content(composed.compose(job)) == content(hydra.config_loader.load_sweep_config(config, job))


def test_a_value_of_another_type_is_refused_as_hydra_refuses_it(compose: Compose) -> None:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    composed = Compositions(hydra.config_loader, lambda overrides: compose(*overrides))
    composed.compose(["experiment=smoke", "rounds=1"])
    with pytest.raises(HydraException, match=r"^Error merging override rounds=many$"):
        composed.compose(["experiment=smoke", "rounds=many"])
