"""How long ranks take to exchange bytes: links inside a node, rails between nodes, and what is shared on the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from experiments.routers.base import FloatArray
from harmoeny.compiled import compiled
from harmoeny.cost import NO_LINKS, Links
from harmoeny.hardware import Hardware
from harmoeny.placement import BoolArray, IntArray


class Topology:
    """The links of ``world_size`` ranks on some hardware; ranks fill one node after the other."""

    def __init__(self, hardware: Hardware, world_size: int) -> None:
        """Lay out the links.

        Raises:
            ValueError: a bandwidth that is needed is not known.
        """
        links = hardware.peer_bytes_per_s
        self._hardware = hardware
        self.world_size = world_size
        self._ranks_per_node = len(links) if links is not None else hardware.ranks_per_node or world_size
        if links is None and hardware.all_to_all_bytes_per_s is None and world_size > 1:
            raise ValueError("hardware.all_to_all_bytes_per_s: null, must be set or measured to simulate an exchange")
        self._links = None if links is None else np.array(links, dtype=np.float64)
        self._routes = None if self._links is None else _routes(self._links)
        self.node = np.arange(world_size) // self._ranks_per_node

    def exchange_s(self, sent_bytes: FloatArray) -> FloatArray:
        """Return when every rank has sent and received everything of an all-to-all that all begin at 0.

        A transfer takes as long as the busiest thing on its way, carrying all that the exchange puts on it; a rank is
        ready when the last of its transfers is.

        Args:
            sent_bytes: float64 ``[world_size(src), world_size(dst)]``; the diagonal does not count.

        Returns:
            float64 ``[world_size]``, in seconds.
        """
        if self.world_size == 1:
            return np.zeros(1)
        hardware = self._hardware
        sent = np.ascontiguousarray(sent_bytes, dtype=np.float64)
        rate = hardware.all_to_all_bytes_per_s
        if self._links is None:
            assert rate is not None
            inside_s = _switched_s(sent, self.node, rate, inside=True)
        else:
            inside_s = np.zeros(self.world_size)
            for node in range(int(self.node[-1]) + 1):
                own = np.flatnonzero(self.node == node)
                inside_s[own] = self._linked_s(sent[np.ix_(own, own)])
        if self.node[-1] == 0:
            return self._with_latency(inside_s)
        # The two share nothing, so they run beside each other.
        network_rate = hardware.network_bytes_per_s or rate
        if network_rate is None:
            raise ValueError("hardware.network_bytes_per_s: null, must be set for several nodes")
        outside_s = _switched_s(sent, self.node, network_rate, inside=False)
        outside_s = np.where(outside_s > 0, outside_s + hardware.network_latency_s, 0.0)
        return self._with_latency(np.maximum(inside_s, outside_s))

    def handed_on_s(
        self, num_bytes: float, senders: IntArray, home: IntArray, halved: BoolArray | None = None
    ) -> FloatArray:
        """Return when every rank has all of the equal parts that it is sent: every link carries one after the other.

        A part goes on when all of it is there. Links take parts in the order of the arguments, ranks ascending.

        Args:
            num_bytes: size of a part.
            senders: int64 ``[num_parts, world_size]``, who sends a part to a rank; negative: nobody.
            home: int64 ``[num_parts]``, who has it in the beginning.
            halved: bool ``[num_parts, world_size]``, of which parts only half goes there; None: of none.

        Returns:
            float64 ``[world_size]``, in seconds; 0 where nothing is sent.
        """
        hardware, links = self._hardware, self.links(num_bytes)
        inside_s = num_bytes / (hardware.all_to_all_bytes_per_s or np.inf)
        outside_s = num_bytes / (hardware.network_bytes_per_s or hardware.all_to_all_bytes_per_s or np.inf)
        busy_s: dict[tuple[str, int] | int, float] = {}
        arrived_s, has_s = np.zeros(self.world_size), np.zeros(senders.shape)
        for part, dst in np.argwhere(senders >= 0).tolist():
            src = int(senders[part, dst])
            begin_s = 0.0 if src == home[part] else float(has_s[part, src])
            same_node, latency_s = self.node[src] == self.node[dst], hardware.all_to_all_latency_s
            way: list[tuple[tuple[str, int] | int, float]]
            if same_node and links.on_way.size:
                used = zip(links.on_way[src, dst].tolist(), links.seconds[src, dst].tolist(), strict=True)
                way = [(link, seconds) for link, seconds in used if link >= 0]
            else:
                kind = "inside" if same_node else "outside"
                way = [((f"{kind} from", src), inside_s), ((f"{kind} to", dst), inside_s)]
                if not same_node:
                    way = [(end, outside_s) for end, _ in way]
                    latency_s += hardware.network_latency_s
            together_s = max(busy_s.get(end, 0.0) for end, _ in way) if not links.on_way.size else 0.0
            share = 0.5 if halved is not None and halved[part, dst] else 1.0
            for end, seconds in way:
                busy_s[end] = max(begin_s, together_s, busy_s.get(end, 0.0)) + share * seconds
            has_s[part, dst] = max(busy_s[end] for end, _ in way) + latency_s
            arrived_s[dst] = max(arrived_s[dst], has_s[part, dst])
        return arrived_s

    def exchange_bytes_per_s(self) -> float | None:
        """Return the rate at which a rank sends in an all-to-all of equal parts, latencies aside; None for one rank."""
        return self._bytes_per_s(range(self.world_size))

    def sender_bytes_per_s(self) -> float | None:
        """Return the rate at which one rank sends to all others while they send nothing; None for one rank."""
        return self._bytes_per_s([0])

    def pair_bytes_per_s(self) -> float | None:
        """Return the rate at which one rank sends to one other, where a slow link decides; None: that of a switch."""
        if self._links is None or self.world_size == 1:
            return None
        num_ranks = min(self.world_size, self._ranks_per_node)
        part, slowest_s = np.zeros((num_ranks, num_ranks)), 0.0
        for src, dst in permutations(range(num_ranks), 2):
            part[src, dst] = 1.0
            slowest_s = max(slowest_s, float(self._linked_s(part).max()))
            part[src, dst] = 0.0
        return 1.0 / slowest_s

    def links(self, expert_bytes: float) -> Links:
        """Return the links that an expert crosses between two ranks of one node, and for how long each is busy."""
        if self._links is None or self._routes is None or self.world_size > len(self._links):
            return NO_LINKS
        num_ranks = self.world_size
        links = self._links[:num_ranks, :num_ranks]
        routes = self._routes if num_ranks == len(self._links) else _routes(links)
        shares = routes.reshape(num_ranks, num_ranks, -1)
        most = int((shares > 0).sum(axis=2).max(initial=0))
        on_way = np.argsort(shares == 0, axis=2, kind="stable")[:, :, :most]
        used = np.take_along_axis(shares, on_way, axis=2)
        rates = np.where(links > 0, links, np.inf).reshape(-1) * self._hardware.peer_efficiency
        return Links(np.where(used > 0, on_way, -1), used * expert_bytes / rates[on_way])

    def _bytes_per_s(self, senders: Sequence[int]) -> float | None:
        if self.world_size == 1:
            return None
        hardware, part = self._hardware, 1e9  # bytes
        sent = np.zeros((self.world_size, self.world_size))
        sent[list(senders)] = part
        latency_s = hardware.all_to_all_latency_s + (hardware.network_latency_s if self.node[-1] > 0 else 0.0)
        return part * (self.world_size - 1) / (float(self.exchange_s(sent).max()) - latency_s)

    def host_fetch_s(self, expert_bytes: float, num_fetches: IntArray | FloatArray) -> FloatArray:
        """Return how long one fetch takes on every rank, on average over the layer, while all begin at the same time.

        What ranks share is shared evenly by those that have not fetched all yet; each gets no more than its own link.

        Args:
            expert_bytes: size of an expert.
            num_fetches: ``[world_size]``, fetches of every rank; half an expert counts as half a fetch.
        """
        hardware = self._hardware
        own_rate = hardware.host_link_bytes_per_s
        assert own_rate is not None
        local_rank = np.arange(self.world_size) % self._ranks_per_node
        end_s = num_fetches * (expert_bytes / own_rate)
        for limit, group_size in (
            (hardware.shared_host_link_bytes_per_s, hardware.ranks_per_host_link),
            (hardware.host_memory_bytes_per_s, hardware.ranks_per_socket or self._ranks_per_node),
        ):
            if limit is not None:
                group = self.node * self._ranks_per_node + local_rank // group_size
                end_s = np.maximum(
                    end_s, _shared_s(num_fetches.astype(np.float64) * expert_bytes, group, own_rate, limit)
                )
        fetch_s: FloatArray = hardware.host_link_latency_s + np.where(
            num_fetches > 0, end_s / np.where(num_fetches > 0, num_fetches, 1), expert_bytes / own_rate
        )
        return fetch_s

    def _with_latency(self, exchange_s: FloatArray) -> FloatArray:
        total_s: FloatArray = self._hardware.all_to_all_latency_s + exchange_s
        return total_s

    def _linked_s(self, sent: FloatArray) -> FloatArray:
        """Return the time per rank of an exchange over the links of one node; float64 ``[ranks][ranks]`` of bytes."""
        assert self._links is not None
        assert self._routes is not None
        sent = sent.copy()
        np.fill_diagonal(sent, 0.0)
        num_ranks = len(sent)
        routes = self._routes if num_ranks == len(self._links) else _routes(self._links[:num_ranks, :num_ranks])
        links = self._links[:num_ranks, :num_ranks].copy()
        np.fill_diagonal(links, np.inf)
        link_s = (routes * sent[:, :, None, None]).sum(axis=(0, 1)) / (links * self._hardware.peer_efficiency)
        pair_s = np.where(routes > 0, link_s, 0.0).max(axis=(2, 3)) * (sent > 0)
        slowest: FloatArray = np.maximum(pair_s.max(axis=0), pair_s.max(axis=1))
        return slowest


@compiled
def _switched_s(sent: FloatArray, node: IntArray, rate: float, inside: bool) -> FloatArray:
    """Return the time per rank where only what a rank sends and what it receives limits it.

    Args:
        sent: float64 ``[world_size(src), world_size(dst)]``, bytes.
        node: int64 ``[world_size]``.
        rate: bytes per second of every rank, each way.
        inside: count what stays inside a node, else what leaves it.
    """
    world_size = sent.shape[0]
    out_s, in_s = np.zeros(world_size), np.zeros(world_size)
    for src in range(world_size):
        for dst in range(world_size):
            if src != dst and (node[src] == node[dst]) == inside:
                out_s[src] += sent[src, dst] / rate
                in_s[dst] += sent[src, dst] / rate
    slowest = np.maximum(out_s, in_s)
    for src in range(world_size):
        for dst in range(world_size):
            if src != dst and sent[src, dst] > 0 and (node[src] == node[dst]) == inside:
                slowest[src] = max(slowest[src], in_s[dst])
                slowest[dst] = max(slowest[dst], out_s[src])
    return slowest


def _routes(links: FloatArray) -> FloatArray:
    """Decide which links carry what between every two ranks.

    Ranks whose own link is slower than a way over one other rank use all such ways, in proportion to the slower of the
    two links of each, as NCCL does on machines without a switch.

    Args:
        links: float64 ``[ranks][ranks]``, bandwidths.

    Returns:
        float64 ``[src][dst][from][to]``, the share of a transfer that a link carries.
    """
    num_ranks = len(links)
    routes = np.zeros((num_ranks,) * 4)
    for src in range(num_ranks):
        for dst in range(num_ranks):
            if src == dst:
                continue
            through = np.minimum(links[src], links[:, dst])
            through[[src, dst]] = 0.0
            faster = np.where(through > links[src, dst], through, 0.0)
            if not faster.any():
                routes[src, dst, src, dst] = 1.0
                continue
            for middle, share in enumerate(faster / faster.sum()):
                routes[src, dst, src, middle] += share
                routes[src, dst, middle, dst] += share
    return routes


@compiled
def _shared_s(num_bytes: FloatArray, group: IntArray, own_rate: float, limit: float) -> FloatArray:
    """Return when every rank has its bytes, if the ranks of a group get no more than ``limit`` bytes/s together.

    Args:
        num_bytes: float64 ``[world_size]``.
        group: int64 ``[world_size]``, ascending.
        own_rate: bytes per second that a rank gets at most.
        limit: bytes per second of a group.
    """
    end_s = np.zeros(len(num_bytes))
    first = 0
    while first < len(group):
        last = first
        while last < len(group) and group[last] == group[first]:
            last += 1
        now_s, done = 0.0, 0.0
        order = first + np.argsort(num_bytes[first:last])
        for place, rank in enumerate(order):
            now_s += (num_bytes[rank] - done) / min(own_rate, limit / (len(order) - place))
            done = num_bytes[rank]
            end_s[rank] = now_s
        first = last
    return end_s
