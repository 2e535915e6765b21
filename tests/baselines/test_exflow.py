from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest

from baselines.exflow import ExFlow
from baselines.kit import affinity
from baselines.kit.affinity import count_crossings, place_by_affinity
from harmoeny.following import count_pairs
from harmoeny.placement import IntArray
from harmoeny.trace import RoutingTrace


def planted(
    num_experts: int, world_size: int, num_layers: int, stay: float, rng: np.random.Generator, num_tokens: int = 3000
) -> tuple[list[IntArray], list[IntArray]]:
    """Tokens that stay with probability ``stay`` in one of ``world_size`` groups of experts, drawn anew per layer.

    Returns:
        Groups, int64 ``[num_experts]``, and expert ids, int64 ``[num_tokens, 1]``, per layer.
    """
    groups = [rng.permutation(np.arange(num_experts) % world_size) for _ in range(num_layers)]
    at = rng.integers(0, world_size, num_tokens)
    expert_ids = []
    for group in groups:
        at = np.where(rng.random(num_tokens) < stay, at, rng.integers(0, world_size, num_tokens))
        members = np.argsort(group, kind="stable").reshape(world_size, -1)
        expert_ids.append(members[at, rng.integers(0, members.shape[1], num_tokens)][:, None])
    return groups, expert_ids


def same_grouping(a: IntArray, b: IntArray) -> bool:
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def all_placements(num_experts: int, world_size: int) -> Iterator[IntArray]:
    """Every way to give all ranks equally many experts."""
    if world_size == 1:
        yield np.zeros(num_experts, dtype=np.int64)
        return
    for held in combinations(range(num_experts), num_experts // world_size):
        others = [e for e in range(num_experts) if e not in held]
        for rest in all_placements(len(others), world_size - 1):
            ranks = np.zeros(num_experts, dtype=np.int64)
            ranks[others] = rest + 1
            yield ranks


@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_exhaustive_search(seed: int, num_layers: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [rng.integers(0, 20, (4, 4)) * rng.integers(0, 2, (4, 4)) for _ in range(num_layers - 1)]
    solution = place_by_affinity(pairs, np.array([2, 2]), node_limit=1000)
    best = min(count_crossings(pairs, ranks) for ranks in product(list(all_placements(4, 2)), repeat=num_layers))
    assert solution.crossings == best == count_crossings(pairs, solution.ranks)
    assert solution.lower_bound == best  # and it is known to be


def test_as_good_as_exhaustive_search_on_three_ranks() -> None:
    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, 20, (6, 6))]
    placements = list(all_placements(6, 3))
    best = min(count_crossings(pairs, ranks) for ranks in product(placements, repeat=2))
    solution = place_by_affinity(pairs, np.array([2, 2, 2]), node_limit=1000)
    assert solution.crossings == solution.lower_bound == best
    # Without the integer programme it is close, and claims nothing.
    swept = place_by_affinity(pairs, np.array([2, 2, 2]), node_limit=0)
    assert best <= swept.crossings <= 1.15 * best
    assert swept.lower_bound == 0


@pytest.mark.parametrize(
    ("num_experts", "world_size", "num_layers", "stay", "node_limit"),
    [
        (8, 2, 4, 0.8, 1),
        (12, 3, 3, 0.8, 1),
        (64, 8, 6, 0.4, 0),  # far too large for the integer programme: the sweeps have to find it
        (32, 4, 3, 0.9, 1),  # too large at once: by halves
    ],
)
def test_planted_groups_are_found(
    num_experts: int, world_size: int, num_layers: int, stay: float, node_limit: int
) -> None:
    groups, expert_ids = planted(num_experts, world_size, num_layers, stay, np.random.default_rng(5))
    trace = RoutingTrace(expert_ids=expert_ids, stacks=[0] * num_layers)
    fitted = ExFlow(node_limit=node_limit).fitted(trace, num_experts, world_size)
    homes = [fitted.place(layer, num_experts, world_size).home for layer in range(num_layers)]
    for home, group in zip(homes, groups, strict=True):
        assert same_grouping(home, group)
    assert fitted.fit is not None
    moving = sum(
        int((a[i[:, 0]] != b[j[:, 0]]).sum())
        for a, b, i, j in zip(homes[:-1], homes[1:], expert_ids[:-1], expert_ids[1:], strict=True)
    )
    assert fitted.fit.crossings == moving
    assert moving / fitted.fit.num_pairs == pytest.approx((1 - stay) * (1 - 1 / world_size), abs=0.02)
    assert fitted.fit.crossings_before > 1.3 * fitted.fit.crossings


def test_weak_affinity_is_found_by_sweeps_alone() -> None:
    for seed in range(6):
        groups, expert_ids = planted(16, 2, 4, 0.3, np.random.default_rng(seed))
        pairs = [count_pairs(a, b, 16) for a, b in pairwise(expert_ids)]
        found = place_by_affinity(pairs, np.array([8, 8]), node_limit=0)
        assert found.crossings <= count_crossings(pairs, groups)


def test_halving_finds_planted_groups_and_bounds_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, expert_ids = planted(8, 4, 3, 0.8, np.random.default_rng(3))
    pairs = [count_pairs(a, b, 8) for a, b in pairwise(expert_ids)]
    sizes = np.full(4, 2)
    optimum = affinity.place_by_affinity(pairs, sizes, node_limit=1000)
    assert optimum.crossings == optimum.lower_bound
    monkeypatch.setattr(affinity, "_MAX_VARIABLES", 300)  # two halves fit, four ranks do not
    halved = affinity._solve_by_halves(pairs, sizes, node_limit=1000)
    for ranks, group in zip(halved.ranks, groups, strict=True):
        assert same_grouping(ranks, group)
    assert halved.crossings == count_crossings(pairs, halved.ranks) == optimum.crossings
    assert 0 < halved.lower_bound <= optimum.crossings


@pytest.mark.parametrize(("num_experts", "world_size"), [(7, 3), (3, 5), (1, 1), (4, 1)])
def test_every_rank_holds_its_share_of_every_layer(num_experts: int, world_size: int) -> None:
    rng = np.random.default_rng(0)
    expert_ids = [rng.integers(0, num_experts, (200, 1)) for _ in range(3)]
    fitted = ExFlow(node_limit=1).fitted(RoutingTrace(expert_ids, [0, 0, 0]), num_experts, world_size)
    for layer in range(3):
        held = fitted.place(layer, num_experts, world_size).resident.sum(axis=0)
        assert held.sum() == num_experts
        assert set(held.tolist()) <= {num_experts // world_size, -(-num_experts // world_size)}


def test_every_pair_of_a_token_counts_and_masked_assignments_do_not() -> None:
    first = np.array([[0, 1], [2, -1]])
    second = np.array([[1, 2], [0, 2]])
    wanted = np.zeros((3, 3), dtype=np.int64)
    for a, b in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 0), (2, 2)):
        wanted[a, b] += 1
    np.testing.assert_array_equal(count_pairs(first, second, 3), wanted)


def test_layers_of_different_stacks_share_no_tokens() -> None:
    rng = np.random.default_rng(1)
    groups, expert_ids = planted(4, 2, 4, 0.95, rng)
    decoder = [ids[:100] for ids in planted(4, 2, 2, 0.95, rng)[1]]  # a decoder step has far fewer tokens
    trace = RoutingTrace([expert_ids[0], decoder[0], *expert_ids[1:], decoder[1]], [0, 1, 0, 0, 0, 1])
    fit = ExFlow().fitted(trace, 4, 2).fit
    assert fit is not None
    assert fit.num_pairs == 3 * len(expert_ids[0]) + 100
    for layer, group in zip((0, 2, 3, 4), groups, strict=True):
        assert same_grouping(np.array(fit.home[layer]), group)


def test_fitted_policy_reaches_the_other_ranks_by_pickle() -> None:
    _, expert_ids = planted(8, 2, 3, 0.8, np.random.default_rng(0))
    fitted = ExFlow().fitted(RoutingTrace(expert_ids, [0, 0, 0]), 8, 2)
    received = pickle.loads(pickle.dumps(fitted))
    for layer in range(3):
        np.testing.assert_array_equal(received.place(layer, 8, 2).home, fitted.place(layer, 8, 2).home)
    assert received.fit == fitted.fit


def test_without_a_fit_and_with_everything_resident() -> None:
    _, expert_ids = planted(8, 2, 2, 0.8, np.random.default_rng(0))
    np.testing.assert_array_equal(ExFlow(placement="round_robin").place(0, 8, 2).home, np.arange(8) % 2)
    fitted = ExFlow(fetch="none").fitted(RoutingTrace(expert_ids, [0, 0]), 8, 2)
    placement = fitted.place(1, 8, 2)
    assert placement.resident.all()
    assert fitted.fit is not None
    assert placement.home.tolist() == fitted.fit.home[1]


def crossings(home: list[list[int]], trace: RoutingTrace) -> int:
    """Count one by one how often a token of a trace with one expert per layer changes rank."""
    return sum(
        home[layer][a[t, 0]] != home[layer + 1][b[t, 0]]
        for layer, (a, b) in enumerate(pairwise(trace.expert_ids))
        for t in range(len(a))
    )


def test_placement_is_saved_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "placement.json"
    _, expert_ids = planted(8, 2, 3, 0.8, np.random.default_rng(0))
    trace = RoutingTrace(expert_ids, [0, 0, 0])
    policy = ExFlow(placement_file=str(path))
    fitted = policy.fitted(trace, 8, 2)
    written = path.read_bytes()
    assert json.loads(written)["gap"] == 0.0
    other = RoutingTrace(
        [np.array([[0], [1], [2], [3]]), np.array([[7], [6], [1], [3]]), np.zeros((4, 1), np.int64)], [0] * 3
    )
    again = policy.fitted(other, 8, 2)  # its routing does not matter any more
    assert fitted.fit is not None
    assert again.fit is not None
    assert again.fit.home == fitted.fit.home
    # What is reported is of this routing.
    assert again.fit_report() == {
        "num_pairs": 8,
        "crossings": crossings(fitted.fit.home, other),
        "crossings_before": crossings([[0, 0, 0, 0, 1, 1, 1, 1]] * 3, other),
        "lower_bound": 0,
        "gap": 1,
    }
    assert path.read_bytes() == written
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("num_experts", "world_size", "stacks", "message"),
    [
        (16, 2, [0, 0, 0], "is for num_experts=8, must be for num_experts=16"),
        (8, 4, [0, 0, 0], "is for world_size=2, must be for world_size=4"),
        (8, 2, [0, 0], r"is for stacks=\[0, 0, 0\], must be for stacks=\[0, 0\]"),
    ],
)
def test_a_placement_for_something_else_is_refused(
    tmp_path: Path, num_experts: int, world_size: int, stacks: list[int], message: str
) -> None:
    policy = ExFlow(placement_file=str(tmp_path / "placement.json"))
    ids = [np.arange(8)[:, None]] * 3
    policy.fitted(RoutingTrace(ids, [0, 0, 0]), 8, 2)
    with pytest.raises(ValueError, match=f"placement_file: .*{message}"):
        policy.fitted(RoutingTrace(ids[: len(stacks)], stacks), num_experts, world_size)


def damage(content: dict[str, object], kind: str) -> str:
    if kind == "no json":
        return "{"
    if kind == "no object":
        return "[]"
    home = [[0, 0, 1, 1]] * 2
    if kind == "rank that does not exist":
        home = [[0, 0, 1, 2], home[1]]
    elif kind == "a layer too few":
        home = home[:1]
    elif kind == "an expert too few":
        home = [[0, 0, 1], home[1]]
    elif kind == "field missing":
        content = {k: v for k, v in content.items() if k != "crossings"}
    return json.dumps(content | {"home": home})


@pytest.mark.parametrize(
    "kind",
    ["no json", "no object", "rank that does not exist", "a layer too few", "an expert too few", "field missing"],
)
def test_a_damaged_placement_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "placement.json"
    policy, trace = ExFlow(placement_file=str(path)), RoutingTrace([np.arange(4)[:, None]] * 2, [0, 0])
    policy.fitted(trace, 4, 2)
    path.write_text(damage(json.loads(path.read_text()), kind))
    with pytest.raises(ValueError, match=r"placement_file: .*must be a file that ExFlow wrote"):
        policy.fitted(trace, 4, 2)


def test_the_node_limit_is_not_negative() -> None:
    with pytest.raises(ValueError, match="node_limit: -1, must be at least 0"):
        ExFlow(node_limit=-1).validate()
