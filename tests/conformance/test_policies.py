"""What every policy must keep, whatever it is for: checked on every one that discovery finds."""

from __future__ import annotations

import copy
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.registry import discover
from harmoeny.choices import Fetch
from harmoeny.cost import ExpertCost
from harmoeny.modelled import PredictsExecuted
from harmoeny.placement import PLACEMENTS, IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy, moves_shared
from harmoeny.shared import make_plan
from harmoeny.trace import RoutingTrace
from tests.strategies import counts_arrays, examples, make_counts, scattered

SYSTEMS: dict[str, type[Policy]] = discover("system")[0]
NUM_LAYERS = 3
#: Every example plans at least once with each of the policy's own placements and once with a scattered one.
EXAMPLES = 350
#: Options that leave out what takes long and may depend on the machine.
QUICK: dict[str, dict[str, Any]] = {"exflow": {"node_limit": 0}}

every_policy = pytest.mark.parametrize("name", sorted(SYSTEMS))


def build(name: str, counts: IntArray, threshold: int, **options: Any) -> Policy:
    """Make a policy ready to plan as a run does: configured, calibrated, fitted."""
    world_size, num_experts = counts.shape
    policy = SYSTEMS[name](**QUICK.get(name, {}), **options)
    policy.validate()
    cost = ExpertCost(token_s=1e-6, fetch_s=threshold * 1e-6, host_token_s=1e-5, host_weights_s=1e-4)
    policy = policy.calibrated(cost)
    if not policy.calibration_batches:
        return policy
    rng = np.random.default_rng(threshold)
    top_k = min(2, num_experts)
    expert_ids = [rng.random((64, num_experts)).argsort(axis=1)[:, :top_k] for _ in range(NUM_LAYERS)]
    trace = RoutingTrace(expert_ids=expert_ids, stacks=[0] * (NUM_LAYERS - 1) + [1])
    return policy.fitted(trace, num_experts, world_size)


def own_placement(policy: Policy, counts: IntArray) -> Placement:
    world_size, num_experts = counts.shape
    placement = policy.place(NUM_LAYERS - 1, num_experts, world_size)
    placement.validate(complete=not policy.caches)
    assert placement.resident.shape == (num_experts, world_size)
    return placement


def any_placement(policy: Policy, counts: IntArray, seed: int) -> Placement:
    world_size, num_experts = counts.shape
    placement = scattered(num_experts, world_size, seed)
    if policy.fetch == "none":  # whoever never fetches is promised to hold everything
        return Placement(home=placement.home, resident=np.ones_like(placement.resident))
    return placement


def check_plan(policy: Policy, counts: IntArray, placement: Placement) -> Plan:
    """Plan, and state the invariants once more without the help of the plan's own methods."""
    before = counts.copy(), placement.home.copy(), placement.resident.copy()
    plan = policy.plan(counts, placement)
    for now, then in zip((counts, placement.home, placement.resident), before, strict=True):
        np.testing.assert_array_equal(now, then, err_msg="an input was modified")

    world_size, num_experts = counts.shape
    assert plan.tokens.shape == (world_size, num_experts, world_size)
    assert plan.tokens.dtype == np.int64
    assert plan.fetch.dtype == np.bool_
    assert plan.tokens.min() >= 0
    executed_of_sender = np.einsum("sed->se", plan.tokens)
    if policy.exact:
        np.testing.assert_array_equal(executed_of_sender, counts)
    assert (executed_of_sender <= counts).all()
    np.testing.assert_array_equal(plan.dropped(counts), counts - executed_of_sender)

    # Held, fetched or executed on the host, and nothing fetched that is held, on the host or not executed: the fetches
    # are exactly those that are needed.
    runs_here = (plan.tokens > 0).any(axis=0)
    on_host = np.zeros_like(plan.fetch) if plan.host is None else plan.host
    assert (on_host <= runs_here).all()
    np.testing.assert_array_equal(plan.fetch, np.where(placement.resident | on_host, False, runs_here))
    if policy.fetch == "none":
        assert not plan.fetch.any()
    plan.validate(counts, placement, exact=policy.exact)
    if isinstance(policy, PredictsExecuted) and (predicted := policy.executed(counts, placement)) is not None:
        np.testing.assert_array_equal(predicted, plan.executed())  # what large simulations take in the plan's place
    return plan


def assert_same(a: Plan, b: Plan) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.fetch, b.fetch)
    np.testing.assert_equal(a.host, b.host)


@pytest.mark.many
@every_policy
@examples(EXAMPLES)
@given(counts=counts_arrays(), threshold=st.integers(1, 10_000), seed=st.integers(0, 2**32 - 1))
def test_random_plans_keep_the_invariants(name: str, counts: IntArray, threshold: int, seed: int) -> None:
    policies = [build(name, counts, threshold, placement=kind) for kind in PLACEMENTS]
    plans = [check_plan(policy, counts, own_placement(policy, counts)) for policy in policies]
    check_plan(policies[0], counts, any_placement(policies[0], counts, seed))

    # A plan depends on nothing but its inputs: neither on who plans nor on what the policy planned in between.
    assert_same(plans[0], policies[0].plan(counts, own_placement(policies[0], counts)))
    again = build(name, counts, threshold, placement=PLACEMENTS[0])
    assert_same(plans[0], again.plan(counts, own_placement(again, counts)))


@every_policy
@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize(
    ("world_size", "num_experts", "counts_kind"),
    [
        (1, 1, "spread"),
        (1, 7, "one_expert"),
        (4, 1, "spread"),
        (3, 8, "none"),
        (3, 8, "one_expert"),
        (5, 3, "spread"),  # more ranks than experts
        (3, 8, "one_sender"),
        (16, 64, "zipf"),
    ],
)
def test_edge_cases(name: str, kind: str, world_size: int, num_experts: int, counts_kind: str) -> None:
    counts = make_counts(counts_kind, world_size, num_experts, 1000, np.random.default_rng(7))
    policy = build(name, counts, 100, placement=kind)
    plan = check_plan(policy, counts, own_placement(policy, counts))
    if world_size == 1 and policy.exact:
        assert plan.load().tolist() == [int(counts.sum())]
        assert not plan.fetch.any()


@pytest.mark.many
@every_policy
@examples(25)
@given(counts=counts_arrays(max_world_size=8, max_experts=16), kind=st.sampled_from(PLACEMENTS))
def test_replacement_gives_placements_to_plan_with(name: str, counts: IntArray, kind: str) -> None:
    policy, twin = (build(name, counts, 100, placement=kind) for _ in range(2))
    placement = own_placement(policy, counts)
    history: list[IntArray] = []
    for batch in range(6):
        kept = copy.deepcopy((history, placement))
        updated = policy.update_placement(0, history, placement)
        same = twin.update_placement(0, history, placement)
        np.testing.assert_equal((history, asdict(placement)), (kept[0], asdict(kept[1])))
        assert (updated is None) == (same is None)
        if updated is not None and same is not None:
            np.testing.assert_equal(asdict(updated), asdict(same))
            updated.validate()
            assert updated.resident.shape == placement.resident.shape
            placement = updated
        check_plan(policy, counts, placement)
        history.append(np.roll(counts, batch, axis=1).copy())


@every_policy
@examples(25)
@given(counts=counts_arrays(max_world_size=8, max_experts=16), kind=st.sampled_from(PLACEMENTS))
def test_looking_ahead_gives_placements_to_plan_with(name: str, counts: IntArray, kind: str) -> None:
    policy, twin = (build(name, counts, 100, placement=kind) for _ in range(2))
    placement = own_placement(policy, counts)
    for layer in range(NUM_LAYERS - 1):
        kept = copy.deepcopy((counts, asdict(placement)))
        ahead, same = (p.look_ahead(layer, counts, placement) for p in (policy, twin))
        np.testing.assert_equal((counts, asdict(placement)), kept)
        assert (ahead is None) == (same is None)
        if ahead is not None and same is not None:
            np.testing.assert_equal(vars(ahead), vars(same))
            ahead.validate()
            assert ahead.resident.shape == placement.resident.shape
            room = policy.room(*ahead.resident.shape)
            assert room is None or ahead.resident.sum(axis=0).max() <= room
            check_plan(policy, np.roll(counts, 1, axis=1).copy(), ahead)


@every_policy
@examples(25)
@given(
    counts=counts_arrays(max_world_size=8, max_experts=16),
    kind=st.sampled_from(PLACEMENTS),
    num_slots=st.none() | st.integers(1, 16),
)
def test_retaining_gives_placements_to_plan_with(name: str, counts: IntArray, kind: str, num_slots: int | None) -> None:
    if not SYSTEMS[name](num_slots=1).caches:
        num_slots = None
    policy, twin = (build(name, counts, 100, placement=kind, num_slots=num_slots) for _ in range(2))
    placement = own_placement(policy, counts)
    history: list[IntArray] = []
    for batch in range(6):
        history.append(np.roll(counts, batch, axis=1).copy())
        check_plan(policy, history[-1], placement)
        kept = copy.deepcopy((history, asdict(placement)))
        retained, same = (p.retain(batch % NUM_LAYERS, history, placement) for p in (policy, twin))
        np.testing.assert_equal((history, asdict(placement)), kept)
        assert (retained is None) == (same is None)
        if retained is not None and same is not None:
            np.testing.assert_equal(vars(retained), vars(same))
            retained.validate(complete=not policy.caches)
            room = policy.room(*retained.resident.shape)
            assert room is None or retained.resident.sum(axis=0).max() <= room
            placement = retained


@every_policy
@pytest.mark.parametrize("counts_kind", ["zipf", "none"])
def test_shared_experts_of_all_tokens_are_executed(name: str, counts_kind: str) -> None:
    world_size, num_experts, num_shared = 4, 8, 2
    routed = make_counts(counts_kind, world_size, num_experts, 1000, np.random.default_rng(5))
    num_tokens = routed.sum(axis=1, keepdims=True)
    counts = np.concatenate([routed, np.repeat(num_tokens, num_shared, axis=1)], axis=1)
    policy = build(name, routed, 100)
    placement = own_placement(policy, routed)
    whole = placement.with_shared(num_shared)
    plan = make_plan(policy, counts, whole)
    plan.validate(counts, whole, exact=policy.exact)
    alone = policy.plan(routed, placement)
    np.testing.assert_array_equal(
        plan.tokens[:, :num_experts], alone.tokens, err_msg="routed experts are planned alike"
    )
    of_experts = (plan.fetch, plan.from_peer, plan.host, plan.senders, plan.halved)
    assert all(len(part) == num_experts + num_shared for part in of_experts if part is not None)
    shared = plan.tokens[:, num_experts:]
    np.testing.assert_array_equal(shared.sum(axis=2), counts[:, num_experts:])
    if not moves_shared(type(policy)):
        np.testing.assert_array_equal(shared[:, 0], np.diag(num_tokens[:, 0]))


@every_policy
def test_planning_leaves_the_policy_as_it_was(name: str) -> None:
    counts = make_counts("zipf", 4, 16, 500, np.random.default_rng(3))
    policy = build(name, counts, 100)
    before = copy.deepcopy(vars(policy))
    for kind in ("zipf", "spread", "none"):
        policy.plan(make_counts(kind, 4, 16, 500, np.random.default_rng(4)), own_placement(policy, counts))
    np.testing.assert_equal(vars(policy), before)


@every_policy
def test_defaults_are_valid_and_all_fields_have_one(name: str) -> None:
    policy = SYSTEMS[name]()
    policy.validate()
    assert policy.name == name
    assert all(f.kw_only for f in fields(policy))
    assert policy.place(0, 8, 4).resident.all() == (policy.fetch == "none")


@every_policy
@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("placement", "nowhere", ", ".join(PLACEMENTS)),
        ("fetch", "soon", ", ".join(Fetch)),
        ("num_slots", 0, "at least 1"),
    ],
)
def test_common_options_are_checked(name: str, option: str, value: Any, allowed: str) -> None:
    policy = SYSTEMS[name](**{option: value})
    with pytest.raises(ValueError, match=rf"{option}: '?{value}'?, must be .*{allowed}"):
        policy.validate()


def test_discovery_finds_our_own_and_the_papers_policies() -> None:
    assert {"harmoeny", "static_ep", "even_split", "drop"} <= set(SYSTEMS)
    assert not SYSTEMS["harmoeny"].baseline
    assert all(SYSTEMS[name].baseline for name in ("static_ep", "even_split", "drop"))
    assert not SYSTEMS["drop"].exact
