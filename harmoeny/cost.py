"""What one expert costs on a machine: the numbers that policies and schedules reckon with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Links(NamedTuple):
    """Which links weights cross from rank to rank, where ranks are joined by links of their own.

    Attributes:
        on_way: int64 ``[world_size(src), world_size(dst), most]``, numbers from 0 on, -1 where there are fewer; or of
            no size, where only what a rank sends and receives counts.
        seconds: float64, likewise, how long an expert keeps each of them busy.
    """

    on_way: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]


#: Where a switch joins the ranks, or nothing is known.
NO_LINKS = Links(np.zeros((0, 0, 0), dtype=np.int64), np.zeros((0, 0, 0)))


@dataclass(frozen=True)
class ExpertCost:
    """What executing and moving one expert costs on the present machine, as calibration measured it.

    Attributes:
        token_s: seconds to execute one more token, in a slice of many.
        fetch_s: seconds to bring one expert's weights to a rank.
        exchange_token_s: seconds that a rank needs to receive one more token in an all-to-all; 0 where it is not known.
        peer_fetch_s: seconds to bring one expert's weights from another rank; 0 where it is not known.
        launch_s: seconds that a slice takes whatever its tokens; no part of :attr:`token_s`.
        weights_s: seconds to read an expert's weights, below which no slice's tokens are computed; 0 where that is not
            known, or is part of :attr:`launch_s`.
        exchange_latency_s: seconds that an exchange takes whatever its rows; part of :attr:`peer_fetch_s`, too.
        copy_token_s: seconds to reorder one token in device memory; 0 where it is not known.
        tile_tokens: tokens that are computed at a time; a slice's are filled up to a multiple.
        grouped: whether all slices that are ready are computed at once, and launched once.
        node_ranks: ranks of a node, where ranks are on several; 0: on one.
        inside_share: what a token or an expert takes inside a node, as a multiple of :attr:`exchange_token_s` or of
            :attr:`peer_fetch_s`, which are means over all ranks.
        network_share: likewise between nodes.
        pair_share: what a single expert takes from one rank to another, as a multiple of :attr:`peer_fetch_s`, which is
            the mean of many that a rank sends to all others at once.
        fetch_together_s: :attr:`fetch_s` while all ranks fetch, where they share links or memory; 0: the same.
        overlaps: whether rows travel while a rank computes.
        links: which links an expert crosses between two ranks, and for how long.
        relays: whether ranks that fetch an expert may hand it on to others.
        early_s: seconds that executing rows before there is a plan takes beside their products, for choosing, gathering
            and adding them up; 0 where it is not known.
        copy_share: share of a copy's time from host memory that it takes from its rank's computation, where the
            processor that computes copies too.
        idle_speedup: how many times as fast a rank computes while all others are idle, where ranks share what computes;
            all other costs are those while all compute.
        host_token_s: seconds in which the rank's host executes one more token, its row's way there and back included;
            0: the host computes nothing.
        host_launch_s: seconds that a slice takes there whatever its tokens.
        host_weights_s: seconds in which the host reads an expert's weights, below which no slice's tokens are computed.
        host_trip_s: seconds that the rows of a layer take there and back, whatever their number.
    """

    token_s: float
    fetch_s: float
    exchange_token_s: float = 0.0
    peer_fetch_s: float = 0.0
    launch_s: float = 0.0
    weights_s: float = 0.0
    exchange_latency_s: float = 0.0
    copy_token_s: float = 0.0
    tile_tokens: int = 1
    grouped: bool = False
    node_ranks: int = 0
    inside_share: float = 1.0
    network_share: float = 1.0
    pair_share: float = 1.0
    fetch_together_s: float = 0.0
    overlaps: bool = True
    links: Links = NO_LINKS
    relays: bool = False
    early_s: float = 0.0
    copy_share: float = 0.0
    idle_speedup: float = 1.0
    host_token_s: float = 0.0
    host_launch_s: float = 0.0
    host_weights_s: float = 0.0
    host_trip_s: float = 0.0

    def numbers(self) -> dict[str, float]:
        """Return all but the links, by name."""
        return {name: value for name, value in vars(self).items() if name != "links"}

    def threshold_tokens(self) -> int:
        """Return the smallest number of tokens whose computation takes as long as one fetch (paper, section 4.2)."""
        nearest = max(1, round(self.fetch_s / self.token_s))
        return nearest if nearest * self.token_s >= self.fetch_s else nearest + 1

    def host_s(self, num_tokens: Sequence[int]) -> float:
        """Return how long a rank's host takes for slices, from when their rows are on the device until they are back.

        Args:
            num_tokens: tokens of every slice, at least 1 each.
        """
        if not num_tokens:
            return 0.0
        slices_s = (self.host_launch_s + max(n * self.host_token_s, self.host_weights_s) for n in num_tokens)
        return self.host_trip_s + sum(slices_s)

    def head_s(
        self, traffic: npt.NDArray[Any], rank: int, first: npt.NDArray[Any] | None = None
    ) -> tuple[float, float]:
        """Return how many seconds after the plan a rank has rows to compute, and how much later all of them.

        Args:
            traffic: ``[world_size(src), world_size(dst)]``, assignments that go from rank to rank.
            rank: the rank.
            first: likewise, of those the ones that are computed while the others are on their way; None: all.
        """
        gather_s = float(traffic.sum(axis=1).max()) * self.copy_token_s
        all_s = gather_s + self._arrival_s(traffic, rank)
        head_s = all_s if first is None else gather_s + self._arrival_s(first, rank)
        return head_s, all_s - head_s

    def _arrival_s(self, traffic: npt.NDArray[Any], rank: int) -> float:
        """Return how long rows are on their way to where a rank computes them; its own are nearly there."""
        own, sent, received = traffic.diagonal(), traffic.sum(axis=1), traffic.sum(axis=0)
        rows = float(np.maximum(sent - own, received - own).max())
        if rows == 0:
            return 0.0
        return self.exchange_latency_s + rows * self.exchange_token_s + float(received[rank]) * self.copy_token_s
