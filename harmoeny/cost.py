"""What one expert costs on a machine: the numbers that policies and schedules reckon with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


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

    def threshold_tokens(self) -> int:
        """Return the smallest number of tokens whose computation takes as long as one fetch (paper, section 4.2)."""
        nearest = max(1, round(self.fetch_s / self.token_s))
        return nearest if nearest * self.token_s >= self.fetch_s else nearest + 1

    def head_s(self, traffic: npt.NDArray[Any], rank: int, *, staged: bool) -> tuple[float, float]:
        """Return how many seconds after the plan a rank has rows to compute, and how much later all of them.

        Args:
            traffic: ``[world_size(src), world_size(dst)]``, assignments that go from rank to rank.
            rank: the rank.
            staged: own rows are computed while the others are on their way.
        """
        sent, received = traffic.sum(axis=1), traffic.sum(axis=0)
        gather_s = float(sent.max()) * self.copy_token_s
        rows = float(np.maximum(sent - traffic.diagonal(), received - traffic.diagonal()).max())
        rest_s = self.exchange_latency_s + rows * self.exchange_token_s + float(received[rank]) * self.copy_token_s
        return (gather_s, rest_s) if staged else (gather_s + rest_s, 0.0)

    def peer_fetches_s(self, num_fetches: int) -> float:
        """Return how long so many fetches take that one rank sends, or one rank receives from others, at once."""
        expert_s = (self.peer_fetch_s or self.fetch_s) - self.exchange_latency_s
        return self.exchange_latency_s + max(float(num_fetches), self.pair_share) * expert_s
