"""Which systems are one and the same is told by what they do, whatever they are called."""

from __future__ import annotations

from itertools import combinations

import pytest

from baselines.even_split import EvenSplit
from baselines.fastmoe import FastMoE
from baselines.static_ep import StaticEP
from experiments.registry import discover
from experiments.results.manifest import behaviour_of
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy


class Renamed(EvenSplit):
    name = "renamed"
    description = "even split under another name"


class PlansAnother(StaticEP):
    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        return super().plan(counts, placement)


class RunsOtherwise(StaticEP):
    @property
    def executor(self) -> str:
        return "somewhere:Else"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (StaticEP(), FastMoE(), True),
        (StaticEP(), StaticEP(), True),
        (EvenSplit(), Renamed(), True),
        (StaticEP(), EvenSplit(), False),
        (StaticEP(), PlansAnother(), False),
        (StaticEP(), RunsOtherwise(), False),
        (StaticEP(), StaticEP(placement="round_robin"), False),
        (StaticEP(), FastMoE(fetch="none"), False),
    ],
)
def test_code_and_options_count_and_names_do_not(one: Policy, other: Policy, same: bool) -> None:
    assert (behaviour_of(one) == behaviour_of(other)) == same


def test_of_all_systems_only_fastmoe_is_another() -> None:
    found = {name: behaviour_of(policy()) for name, policy in discover("system")[0].items()}
    same = {frozenset(pair) for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]}
    assert same == {frozenset({"static_ep", "fastmoe"})}
