from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given

from experiments.compose.help import help_text
from experiments.registry import discover
from harmoeny.placement import IntArray, Placement
from tests.conftest import Load
from tests.harmoeny.runtime.cases import TOLERANCE, expected_output, random_experts, random_tokens, start
from tests.strategies import batches, examples

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test does"
)


@needs_deepspeed
@examples(100)
@given(batch=batches())
def test_everything_goes_home_and_the_drop_variant_keeps_what_the_capacity_lets_through(
    batch: tuple[IntArray, Placement],
) -> None:
    from baselines.deepspeed_moe import DeepSpeedMoE, DeepSpeedMoEDrop

    counts, placement = batch
    for policy, kept in (
        (DeepSpeedMoE(), counts),
        (DeepSpeedMoEDrop(capacity_factor=1e9), counts),
        # A factor of nearly nothing leaves DeepSpeed's least capacity.
        (DeepSpeedMoEDrop(capacity_factor=1e-9), np.minimum(counts, 4)),
    ):
        plan = policy.plan(counts, placement)
        for expert, home in enumerate(placement.home):
            np.testing.assert_array_equal(plan.tokens[:, expert, home], kept[:, expert])
        assert plan.tokens.sum() == kept.sum()


@needs_deepspeed
def test_one_rank_without_a_process_group_is_exact_and_copies_no_weights() -> None:
    from baselines.deepspeed_moe import DeepSpeedMoE

    layer, tokens = random_experts(4, 0), random_tokens(3, 11, 4, 2)
    engine = start([layer], record=False)
    system = engine.build_system("x", DeepSpeedMoE())
    with torch.inference_mode():
        for _ in range(2):
            engine.use(system)
            output = engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    expected = expected_output(layer, tokens.hidden, tokens.ids, tokens.weights, tokens.ids >= 0)
    assert (output - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()
    assert system.fetcher.device_bytes == 4 * layer.expert_bytes
    module = system.executor._layers[0].module  # type: ignore[attr-defined]
    assert list(module.parameters()) == []
    engine.close()


@needs_deepspeed
def test_ranks_must_divide_the_experts(load: Load) -> None:
    overrides = ["system=[static_ep,deepspeed_moe]", "model=switch_tiny"]
    assert "deepspeed_moe" in load(*overrides, "world_size=2").systems
    with pytest.raises(
        ValueError, match=r"^world_size: 3, must divide \d+ \(model.num_experts\): .*\(systems.deepspeed_moe\)$"
    ):
        load(*overrides, "world_size=3")


@needs_deepspeed
@pytest.mark.parametrize(
    ("option", "allowed"), [("fetch=sync", "async"), ("num_slots=2", "null"), ("work_order=paper", "covered")]
)
def test_options_for_moving_weights_are_refused(option: str, allowed: str, load: Load) -> None:
    name, value = option.split("=")
    with pytest.raises(ValueError, match=rf"systems.deepspeed_moe.{name}: '?{value}'?, must be {allowed}, the default"):
        load("system=[deepspeed_moe]", f"systems.deepspeed_moe.{option}")


@needs_deepspeed
@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf"])
def test_capacity_factors_are_positive(factor: str, load: Load) -> None:
    with pytest.raises(ValueError, match=r"systems.deepspeed_moe_drop.capacity_factor: .*, must be a number above 0"):
        load("system=[deepspeed_moe_drop]", f"systems.deepspeed_moe_drop.capacity_factor={factor}")


@pytest.mark.parametrize("installed", [None, "0.18.2"])
def test_without_the_library_the_systems_are_unavailable_and_the_others_are_there(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(discover("system")[0]) - {"deepspeed_moe", "deepspeed_moe_drop"}
    original: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name != "deepspeed":
            return original(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "baselines.deepspeed_moe", raising=False)
    found, unavailable = discover("system")
    assert set(found) == others
    what = "is not installed" if installed is None else "0.18.2 is too old"
    command = "DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19.8'"
    assert unavailable == {"deepspeed_moe": f"deepspeed {what}: {command}"}
    assert f"unavailable here: deepspeed {what}: {command}" in help_text()
