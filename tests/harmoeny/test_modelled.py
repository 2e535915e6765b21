"""What the simulator asks is optional: who answers, and what holds for all others."""

from __future__ import annotations

import numpy as np

from baselines.even_split import EvenSplit
from experiments.registry import discover
from experiments.simulator.flows import plan_flows
from harmoeny.modelled import PadsBuffers, PredictsExecuted
from harmoeny.placement import place
from harmoeny.policy import BlindPolicy
from harmoeny.rebalance import TokenHarMoEny


def answering(protocol: type) -> set[str]:
    systems = discover("system")[0].items()
    return {name for name, system in systems if isinstance(system(), protocol)} - {
        "deepspeed_moe",
        "deepspeed_moe_drop",
    }


def test_few_policies_answer() -> None:
    assert answering(PadsBuffers) == set(), "only DeepSpeed, where it is installed, pads"
    blind = {name for name, system in discover("system")[0].items() if issubclass(system, BlindPolicy)}
    assert answering(PredictsExecuted) - blind == {"harmoeny", "harmoeny_tokens", "ultraep"}
    assert blind > {"static_ep", "eplb"}


def test_a_policy_that_answers_nothing_is_modelled_from_its_plan() -> None:
    counts = np.array([[4, 0], [1, 3]], dtype=np.int64)
    policy, placement = EvenSplit(), place("contiguous", 2, 2)
    for protocol in (PadsBuffers, PredictsExecuted):
        assert not isinstance(policy, protocol)
    flows, plan = plan_flows(policy, counts, placement), policy.plan(counts, placement)
    np.testing.assert_array_equal(flows.executed, plan.executed())
    np.testing.assert_array_equal(flows.traffic, plan.tokens.sum(axis=1))
    assert flows.slices is None
    assert flows.computed is None


def test_an_answer_may_depend_on_options() -> None:
    counts, placement = np.array([[9, 0], [9, 0]], dtype=np.int64), place("contiguous", 2, 2)
    assert TokenHarMoEny(threshold=1).executed(counts, placement) is not None
    assert TokenHarMoEny(threshold=1, sender_order="largest_first").executed(counts, placement) is None
