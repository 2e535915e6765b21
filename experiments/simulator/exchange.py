"""What dispatch and combine take: rows are picked, sent, grouped by expert, and on the way back the same reversed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from experiments.routers.base import FloatArray
from experiments.simulator.cost import CostModel
from harmoeny.placement import Placement


@dataclass(frozen=True)
class ExchangeTimes:
    """Times of one direction; all arrays are float64 ``[world_size]``.

    Attributes:
        rows: rows that a rank prepares, for itself too.
        gather_s: picking them out of the tokens.
        wire_s: the all-to-all.
        group_s: ordering received rows by expert, and the results back.
        add_s: putting results in their places and weighting them.
    """

    rows: FloatArray
    gather_s: FloatArray
    wire_s: FloatArray
    group_s: FloatArray
    add_s: FloatArray

    def at(self, pace: FloatArray) -> ExchangeTimes:
        """Return the same for ranks that take so many times as long (float64 ``[world_size]``) for their own part."""
        return replace(
            self, gather_s=self.gather_s * pace, group_s=self.group_s * pace, add_s=self.add_s * pace
        )  # fmt: skip


def plain_exchange(cost: CostModel, traffic: FloatArray) -> ExchangeTimes:
    """Return the times of our dispatch: one all-to-all of exactly the assignments.

    Args:
        cost: the cost model.
        traffic: float64 ``[world_size(src), world_size(dst)]``, assignments.
    """
    sent, received = traffic.sum(axis=1), traffic.sum(axis=0)
    several_sources = (traffic > 0).sum(axis=0) > 1
    return ExchangeTimes(
        rows=sent,
        gather_s=cost.copy_s(sent),
        wire_s=cost.exchange_s(traffic),
        group_s=np.where(several_sources, cost.copy_s(received), 0.0),
        add_s=2 * cost.copy_s(sent),
    )


def padded_exchange(cost: CostModel, num_tokens: int, capacity: int, placement: Placement) -> ExchangeTimes:
    """Return the times of a padding system: every rank sends ``capacity`` rows for every expert to its home rank.

    Tokens are copied to their places, or brought there by a product where the software does so
    (:attr:`SoftwareCost.padded`).

    Args:
        cost: the cost model.
        num_tokens: tokens of a rank.
        capacity: rows per expert and rank.
        placement: the homes.
    """
    world_size = placement.world_size
    residents = np.bincount(placement.home, minlength=world_size)
    traffic = np.tile(residents * float(capacity), (world_size, 1))
    rows = traffic.sum(axis=1)
    if cost.software.padded:
        spread_s = np.full(world_size, cost.gather_by_product_s(num_tokens, capacity))
    else:
        spread_s = cost.copy_s(rows)
    return ExchangeTimes(
        rows=rows,
        gather_s=spread_s,
        wire_s=cost.exchange_s(traffic),
        group_s=np.zeros(world_size),
        add_s=spread_s,
    )
