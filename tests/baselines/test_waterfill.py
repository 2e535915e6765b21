"""Waterfill: shares against the closed form, least moves against brute force, and shared experts of every system."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.eplb import EPLB
from baselines.eps_moe import EpsMoE
from baselines.fastermoe import FasterMoE
from baselines.ideal import Ideal
from baselines.static_ep import StaticEP
from baselines.ultraep import UltraEP
from baselines.waterfill import Waterfill, in_proportion, with_least_moves
from experiments.simulator.backend import simulate
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.shared import make_plan
from tests.conftest import Load
from tests.harmoeny.runtime.cases import expected_output, random_experts, random_tokens, start
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples

NUM_ROUTED, NUM_SHARED = 6, 2


@examples(100)
@given(
    loads=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 5000)), min_size=1, max_size=8),
    num_shared=st.integers(1, 4),
)
def test_shares_are_in_proportion_to_the_room_below_the_even_load(
    loads: list[tuple[int, int]], num_shared: int
) -> None:
    load, num_tokens = np.array(loads, dtype=np.int64).T.copy()
    pairs = in_proportion(num_tokens, load, num_shared)
    assert pairs.min() >= 0
    np.testing.assert_array_equal(pairs.sum(axis=1), num_tokens)
    target = -(-(load.sum() + num_shared * num_tokens.sum()) // len(load))
    room = np.maximum(target - load, 0.0) * np.where(np.eye(len(load)), 1.0, 10 / 11)
    wanted = num_tokens[:, None] * room / np.maximum(room.sum(axis=1, keepdims=True), 1e-9)
    assert (np.abs(pairs - wanted) < 1).all()
    filled = (load + num_shared * pairs.sum(axis=0))[load < target]
    # Were no rank preferred to others, none would be above the target but for the rounding.
    assert (filled <= 1.1 * target + num_shared * len(load)).all()


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    return [c for c in product(range(total + 1), repeat=parts) if sum(c) == total]


@examples(40)
@given(
    loads=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3),
    num_shared=st.integers(1, 3),
)
def test_no_split_has_a_smaller_largest_load_or_as_small_a_one_with_fewer_moves(
    loads: list[tuple[int, int]], num_shared: int
) -> None:
    load, num_tokens = np.array(loads, dtype=np.int64).T.copy()

    def value(pairs: IntArray) -> tuple[int, int]:
        return int((load + num_shared * pairs.sum(axis=0)).max()), int(pairs.sum() - np.trace(pairs))

    pairs = with_least_moves(num_tokens, load, num_shared)
    np.testing.assert_array_equal(pairs.sum(axis=1), num_tokens)
    rows = [compositions(int(n), len(load)) for n in num_tokens]
    assert value(pairs) == min(value(np.array(split)) for split in product(*rows))


def test_worked_out_by_hand() -> None:
    load, num_tokens = np.array([900, 100, 500, 500]), np.full(4, 100)
    # The target is 600: room for nothing, 500, 100 and 100.
    assert in_proportion(num_tokens, load, 1).sum(axis=0).tolist() == [0, 285, 57, 58]
    # 900 cannot be helped, so only the first rank's tokens have to go; the others have room for 700, 300 and 300 more.
    assert with_least_moves(num_tokens, load, 1).tolist() == [
        [0, 53, 23, 24], [0, 100, 0, 0], [0, 0, 100, 0], [0, 0, 0, 100],
    ]  # fmt: skip
    few = Waterfill().place_shared(np.array([63, 64, 0, 64]), load, 1)
    assert few[0].tolist() == [63, 0, 0, 0], "a rank with fewer than 64 tokens keeps them"
    # The target is 548 for 963, 100, 500 and 500; of 11 x 448 + 10 x (48 + 48) parts its own rank gets 4928.
    assert few[1].tolist() == [0, 53, 5, 6]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="split: 'even', must be one of proportional, least_moves"):
        Waterfill(split="even").validate()
    with pytest.raises(ValueError, match="min_tokens: -1, must be at least 0"):
        Waterfill(min_tokens=-1).validate()


def test_a_policy_that_places_shared_experts_by_the_load_says_that_it_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Waterfill, "knows", frozenset({Knowledge.HISTORY}))
    with pytest.raises(ValueError, match="must have exact for waterfill, which places shared experts"):
        Waterfill().validate()


@pytest.mark.many
@pytest.mark.parametrize(
    "policy",
    [
        Waterfill(min_tokens=0),
        Waterfill(min_tokens=0, split="least_moves"),
        EPLB(interval=1, window=1),
        FasterMoE(token_s=1.0, shadow_s=1.0),
        EpsMoE(num_stages=2),
        UltraEP(spare_slots=1),
        Ideal(),
    ],
    ids=lambda policy: str(policy.name),
)
@pytest.mark.parametrize(("kernel", "world_size"), [("loop", 4), ("grouped_mm", 1), ("grouped_mm", 3)])
def test_shared_experts_are_executed_beside_the_routed_ones(policy: Policy, kernel: str, world_size: int) -> None:
    experts = replace(random_experts(NUM_ROUTED + NUM_SHARED, seed=1), num_shared=NUM_SHARED)

    def rank_main(comm: ThreadCommunicator) -> tuple[float, IntArray, int]:
        engine = start([experts], comm, kernel=kernel)
        engine.use(engine.build_system("x", policy))
        worst = 0.0
        for batch in range(3):
            engine.recorder.begin_iteration()
            engine.recorder.begin_layer(0)
            t = random_tokens(10 * batch + comm.rank, 20 + comm.rank, NUM_ROUTED, 2, masked=0.1)
            gate = torch.linspace(0.1, 2.0, len(t.hidden))
            with engine.executed_masks() as masks:
                output = engine.forward(0, t.hidden, t.ids, t.weights, gate)
            assert masks[0].equal(t.ids >= 0), "the router's assignments, without the shared experts'"
            expected = expected_output(experts, t.hidden, t.ids, t.weights, t.ids >= 0)
            shared = torch.arange(NUM_ROUTED, NUM_ROUTED + NUM_SHARED).expand(len(t.hidden), -1)
            everywhere = torch.ones_like(shared, dtype=torch.bool)
            expected += expected_output(experts, t.hidden, shared, gate[:, None].expand_as(shared), everywhere)
            worst = max(worst, float((output - expected).abs().max() / expected.abs().max()))
        engine.finish()
        (times,) = engine.recorder.collect()
        plan = times.marks.plan
        assert plan is not None
        engine.close()
        return worst, plan.tokens[:, NUM_ROUTED:].sum(axis=1), plan.load().max()

    results = run_threads(world_size, rank_main)
    assert max(worst for worst, _, _ in results) <= 1e-5
    own = np.diag(NUM_SHARED * (20 + np.arange(world_size)))
    moved = not np.array_equal(results[0][1], own)
    assert moved == (isinstance(policy, Waterfill) and world_size > 1)


def test_simulated_loads_are_filled_up_and_memory_is_equal(load: Load) -> None:
    """Closed form: the hot rank's load is its routed one, the others are even."""
    point = load(
        "backend=simulator", "hardware=h200", "world_size=4", "model=moe_stack", "model.num_experts=8", "model.top_k=2",
        "model.num_shared_experts=1", "router=skew", "router.skew=0.4", "system=[static_ep,waterfill,eplb]",
        "rounds=1", "batch_size=1", "seq_len=400", "spare_slots=1",
    )  # fmt: skip
    simulation = simulate(point)
    assert len({note["device_expert_bytes"] for note in simulation.notes.values()}) == 1
    loads = {
        name: [i.layers[0]["executed_tokens"] for i in simulation.iterations if i.system == name]
        for name in point.systems
    }
    routed = [simulation.routed[0][0][2 * rank : 2 * rank + 2].sum() for rank in range(4)]
    assert loads["static_ep"] == [n + 400 for n in routed]
    assert sum(loads["waterfill"]) == sum(loads["static_ep"]) == 4 * 400 * 3
    assert loads["waterfill"][0] == routed[0] > 4 * 400 * 3 / 4
    assert np.ptp(loads["waterfill"][1:]) <= 4


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (
            ["system=[waterfill]"],
            "systems.waterfill: must go with a model that hands its shared experts to the runtime",
        ),
        (["model.num_shared_experts=-1"], "model.num_shared_experts: -1, must be at least 0"),
        (
            ["model.num_shared_experts=1", "system=[static_ep]", "systems.static_ep.num_slots=1"],
            "model: 1 shared experts in the runtime, must be none with systems.static_ep, whose ranks have fewer slots",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(load: Load, overrides: list[str], refused: str) -> None:
    with pytest.raises(ValueError, match=refused.replace(".", r"\.")):
        load("model=moe_stack", "world_size=2", *overrides)


def test_shared_experts_join_a_plan_in_which_receivers_hand_experts_on() -> None:
    """Who sends what is a field of its own: shared experts stay out of it."""

    class HandsOn(StaticEP):
        def plan(self, counts: IntArray, placement: Placement) -> Plan:
            plan = super().plan(counts, placement)
            plan.tokens[0, 0, :] = [0, 2, 2]
            from_peer = np.array([[False, True, True], [False, False, False], [False, False, False]])
            senders = np.array([[-1, 0, 1], [-1, -1, -1], [-1, -1, -1]])
            return replace(plan, fetch=from_peer, from_peer=from_peer, senders=senders)

    placement, counts = HandsOn().place(0, 3, 3).with_shared(1), np.full((3, 4), 4)
    counts[1:, 0] = 0
    plan = make_plan(HandsOn(), counts, placement)
    plan.validate(counts, placement)
    assert plan.senders is not None
    assert plan.senders[:, 2].tolist() == [1, -1, -1, -1]
