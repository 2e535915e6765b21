"""HarMoEny by time as a policy: what its options switch off, and when placements change."""

from __future__ import annotations

import numpy as np

from harmoeny.cost import ExpertCost
from harmoeny.held import shares_at_home
from harmoeny.placement import IntArray, place
from harmoeny.plan import tokens_of_shares
from harmoeny.predict import Costs, loads_of_shares
from harmoeny.timed import HarMoEny
from harmoeny.wire import exchange_s
from tests.harmoeny.test_balance import COSTS

#: Two nodes of two ranks; a row takes ten times as long between nodes.
NODES = ExpertCost(
    token_s=1.0,
    fetch_s=1e4,
    exchange_token_s=10.0,
    peer_fetch_s=30.0,
    node_ranks=2,
    inside_share=0.2,
    network_share=2.0,
)


def hot(expert: int, num_experts: int = 8, world_size: int = 4) -> IntArray:
    """A batch of which one expert gets most."""
    counts = np.full((world_size, num_experts), 10)
    counts[:, expert] = 400
    return counts


def test_rows_stay_on_their_node_where_they_can() -> None:
    counts, shares = np.array([[4], [4], [4], [4]]), np.array([[8, 0, 0, 8]])
    near = tokens_of_shares(counts, shares, 2)[:, 0]
    assert near.tolist() == [[4, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 4]]
    anywhere = tokens_of_shares(counts, np.array([[0, 8, 8, 0]]))[:, 0]
    assert anywhere.sum(axis=0).tolist() == [0, 8, 8, 0]


def test_an_exchange_takes_as_long_as_its_slower_part_inside_nodes_or_between_them() -> None:
    costs = COSTS._replace(exchange_token_s=10.0, node_ranks=2.0, inside_share=0.2, network_share=2.0)
    counts, home = np.array([[0, 50], [0, 0], [3, 0], [0, 0]]), np.array([0, 1])

    def seconds(costs: Costs) -> float:
        shares = shares_at_home(counts.sum(axis=0), home, len(counts))
        shares = np.concatenate([shares, np.zeros((4 - len(shares), 2), np.int64)])
        return exchange_s(counts, shares, loads_of_shares(counts, shares, costs), costs)

    # Rank 0 sends 50 rows to rank 1 inside the node; rank 2 sends 3 rows to rank 0 over the network.
    assert seconds(costs) == 1.0 + max(50 * 0.2, 3 * 2.0) * 10.0
    assert seconds(costs._replace(network_share=20.0)) == 1.0 + 3 * 20.0 * 10.0
    assert seconds(costs._replace(node_ranks=0.0)) == 1.0 + 50 * 10.0, "in one node all rows count alike"


def test_without_nodes_all_links_are_alike() -> None:
    counts, placement = hot(0), place("contiguous", 8, 4)
    alike = HarMoEny(costs={"node_ranks": 0.0}).calibrated(NODES).plan(counts, placement)
    flat = HarMoEny(costs={"node_ranks": 0.0, "inside_share": 1.0, "network_share": 1.0}).calibrated(NODES)
    np.testing.assert_array_equal(alike.tokens, flat.plan(counts, placement).tokens)
    assert alike.predicted_s == flat.plan(counts, placement).predicted_s
    assert HarMoEny().calibrated(NODES).plan(counts, placement).predicted_s != alike.predicted_s


class TestPlacements:
    policy = HarMoEny(fetch="async").calibrated(ExpertCost(token_s=1.0, fetch_s=500.0))
    placement = place("contiguous", 8, 4)

    def batch(self, *experts: int) -> IntArray:
        counts = np.full((4, 8), 10)
        counts[:, list(experts)] = 100
        return counts

    def test_hot_experts_of_one_rank_are_parted_after_three_batches(self) -> None:
        same = self.batch(0, 1)
        assert self.policy.update_placement(0, [same] * 2, self.placement) is None
        changed = self.policy.update_placement(0, [same] * 3, self.placement)
        assert changed is not None
        assert changed.home[0] != changed.home[1]
        assert self.policy.update_placement(0, [same] * 4, self.placement) is None, "every few batches"
        assert self.policy.update_placement(0, [same] * 11, self.placement) is not None

    def test_what_fits_the_latest_batches_by_chance_is_not_taken(self) -> None:
        """Its gain there is small against that in the batch that it was derived from."""
        batches = [self.batch(0, 1), self.batch(0), self.batch(0)]
        batches[1][:, 1] = batches[2][:, 1] = 15
        assert self.policy.update_placement(0, batches, self.placement) is None
        batches[1][:, 1] = batches[2][:, 1] = 60
        assert self.policy.update_placement(0, batches, self.placement) is not None

    def test_hot_experts_that_move_change_nothing(self) -> None:
        moving = [self.batch(expert) for expert in (4, 3, 5, 2, 7, 1, 6, 0, 4, 2, 6)]
        assert self.policy.update_placement(0, moving, self.placement) is None

    def test_settle_switches_that_off(self) -> None:
        fixed = HarMoEny(fetch="async", settle=False).calibrated(ExpertCost(token_s=1.0, fetch_s=500.0))
        assert fixed.update_placement(0, [self.batch(0, 1)] * 3, self.placement) is None


def test_a_hot_expert_that_stays_hot_is_moved_once_although_fetches_hide() -> None:
    """Fetched in every batch it costs next to nothing, by these costs; moved once it costs nothing at all."""
    costs = {
        "token_s": 1e-4, "launch_s": 4e-4, "weights_s": 0.0, "exchange_token_s": 1e-6, "exchange_latency_s": 0.0,
        "copy_token_s": 0.0, "fetch_s": 3e-3, "peer_fetch_s": 6e-3, "tile_tokens": 1.0, "grouped": 0.0,
        "node_ranks": 0.0, "inside_share": 1.0, "network_share": 1.0, "pair_share": 1.0,
    }  # fmt: skip
    policy = HarMoEny(costs=costs).with_spare_slots(0, 16, 2)
    placement = policy.place(0, 16, 2)
    counts = np.full((2, 16), 36)
    counts[:, :2] = 260  # both on rank 0
    history = [counts] * 3
    then = policy.update_placement(0, history, placement)
    assert then is not None
    now, after = policy.plan(counts, placement), policy.plan(counts, then)
    assert now.fetch.any()
    assert not after.fetch.any()
    assert now.predicted_s is not None
    assert after.predicted_s is not None
    assert 0.99 * now.predicted_s < after.predicted_s < now.predicted_s, "no more than a new placement has to gain"
