"""What is known of the machine that ranks run on: measured by calibration, or given to emulate or simulate another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from harmoeny.choices import KernelName
from harmoeny.cost import ExpertCost

HOST_LINKS = ("memcpy", "emulated")
#: What may be said to compute experts: ``auto`` depends on where it runs.
KERNELS = (KernelName.LOOP, KernelName.GROUPED_MM, KernelName.TRITON)
_RATES = (
    "host_link_bytes_per_s", "expert_flops_per_s", "all_to_all_bytes_per_s", "shared_host_link_bytes_per_s",
    "host_memory_bytes_per_s", "device_memory_bytes", "device_memory_bytes_per_s", "dense_flops_per_s",
    "network_bytes_per_s", "host_flops_per_s", "host_weights_bytes_per_s", "cache_bytes",
)  # fmt: skip
_AT_LEAST_0 = (
    "host_link_latency_s", "expert_launch_s", "all_to_all_latency_s", "operator_s", "network_latency_s",
    "runtime_layer_s", "early_s", "expert_half_rate_width", "round_spread", "rank_spread", "host_launch_s",
    "device_sharing",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine.

    Attributes:
        name: its name in records.
        host_link: on a CPU, what brings an expert from the store to a slot: ``memcpy`` (the processor copies) or
            ``emulated`` (a copy takes the time of the link below, without using the processor). CUDA uses its own link.
        host_link_bytes_per_s: bandwidth from host to device memory; null where it was not measured.
        host_link_latency_s: time of a transfer of no bytes.
        expert_flops_per_s: rate of an expert's matrix products on one rank; null where it was not measured.
        expert_launch_s: time that a wave of experts takes whatever its tokens; with ``loop`` every expert is one.
        kernel: what computes experts: ``loop``, one after the other, or ``grouped_mm`` or ``triton``, a wave at once.
        expert_tile_rows: rows that the kernel computes at a time; an expert's are filled up to a multiple.
        expert_half_rate_width: width between an expert's matrices (both halves, where it is gated) with which it
            computes at half of ``expert_flops_per_s``; 0: any width computes at all of it.
        cache_bytes: what of an expert's rows stays in the cache that a rank has while the expert is computed; those of
            more are read from memory anew for every tile of columns, as wide as tiles are high; null: all stay.
        all_to_all_bytes_per_s: rate at which a rank sends in an all-to-all; null where it was not measured.
        all_to_all_latency_s: time of an all-to-all of no bytes.
        puts: ranks write rows into each other's memory where they are executed, as with ``exchange=put`` on CUDA: they
            need no putting in order, and do not travel beside computation.
        device_sharing: by how much every other rank that computes on the same device at the same time slows a rank's
            experts down, as a share of their time; 0: not at all, or nobody else is there.
        source: where the values come from, and whether they were measured.
        ranks_per_host_link: ranks that share what lies between them and host memory (a PCIe switch).
        shared_host_link_bytes_per_s: what these ranks get together; null: no limit beside each rank's own link.
        ranks_per_socket: ranks whose experts come from the same host memory; null: all of a node.
        host_memory_bytes_per_s: what the ranks of a socket read from host memory together; null: no limit.
        device_memory_bytes: memory of one device; null: no limit.
        device_memory_bytes_per_s: its bandwidth; null: never a limit.
        dense_flops_per_s: rate of the matrix products outside the experts; null: as in the experts.
        operator_s: the least time that any operator outside the experts takes.
        host_link_processor_share: share of a copy's time that it takes from the computation of its rank, where the
            processor that computes copies too.
        runtime_layer_s: time of the runtime's own code per MoE layer, whatever is computed.
        early_s: time that executing rows before there is a plan takes a rank beside their products.
        round_spread: by how much rounds differ, all ranks together: standard deviation of the times' logarithm.
        rank_spread: by how much a rank's times of the same layer differ within a round, likewise.
        peer_bytes_per_s: ``[ranks per node][ranks per node]``, bandwidth of the link from one rank to another inside a
            node; null: a switch, through which every rank sends at ``all_to_all_bytes_per_s``.
        peer_efficiency: share of ``peer_bytes_per_s`` that an all-to-all gets.
        ranks_per_node: ranks on one host; null: all.
        network_bytes_per_s: rate at which a rank sends to other nodes; null: as inside its node.
        network_latency_s: time that an all-to-all over several nodes takes beside that of its bytes.
        link_factor: how many times as fast as described links between ranks are taken to be, to see what depends on it.
        host_flops_per_s: rate of an expert's matrix products on the host of one rank, with the threads that it has;
            null: hosts compute no experts.
        host_weights_bytes_per_s: rate at which these threads read weights; null: never a limit.
        host_launch_s: time that an expert takes on the host whatever its tokens.
    """

    name: str = "unnamed"
    host_link: str = "memcpy"
    host_link_bytes_per_s: float | None = None
    host_link_latency_s: float = 0.0
    expert_flops_per_s: float | None = None
    expert_launch_s: float = 0.0
    kernel: str = KernelName.LOOP.value
    expert_tile_rows: int = 1
    expert_half_rate_width: float = 0.0
    cache_bytes: float | None = None
    all_to_all_bytes_per_s: float | None = None
    all_to_all_latency_s: float = 0.0
    puts: bool = False
    device_sharing: float = 0.0
    source: str = ""
    ranks_per_host_link: int = 1
    shared_host_link_bytes_per_s: float | None = None
    ranks_per_socket: int | None = None
    host_memory_bytes_per_s: float | None = None
    device_memory_bytes: float | None = None
    device_memory_bytes_per_s: float | None = None
    dense_flops_per_s: float | None = None
    operator_s: float = 0.0
    host_link_processor_share: float = 0.0
    runtime_layer_s: float = 0.0
    early_s: float = 0.0
    round_spread: float = 0.0
    rank_spread: float = 0.0
    peer_bytes_per_s: list[list[float]] | None = None
    peer_efficiency: float = 1.0
    ranks_per_node: int | None = None
    network_bytes_per_s: float | None = None
    network_latency_s: float = 0.0
    host_flops_per_s: float | None = None
    host_weights_bytes_per_s: float | None = None
    host_launch_s: float = 0.0
    link_factor: float = 1.0

    def resolved(self) -> Hardware:
        """Return it with the factor in the rates of its links, and no factor any more.

        Raises:
            ValueError: a factor that is not above 0.
        """
        if not 0 < self.link_factor < float("inf"):
            raise ValueError(f"hardware.link_factor: {self.link_factor}, must be a number above 0")
        if self.link_factor == 1.0:
            return self

        def scaled(rate: float | None) -> float | None:
            return None if rate is None else rate * self.link_factor

        peers = self.peer_bytes_per_s
        return replace(
            self,
            all_to_all_bytes_per_s=scaled(self.all_to_all_bytes_per_s),
            network_bytes_per_s=scaled(self.network_bytes_per_s),
            peer_bytes_per_s=None if peers is None else [[rate * self.link_factor for rate in row] for row in peers],
            link_factor=1.0,
        )

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.host_link not in HOST_LINKS:
            raise ValueError(f"hardware.host_link: {self.host_link!r}, must be one of {', '.join(HOST_LINKS)}")
        if self.kernel not in KERNELS:
            raise ValueError(f"hardware.kernel: {self.kernel!r}, must be one of {', '.join(KERNELS)}")
        for field in _RATES:
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"hardware.{field}: {value}, must be a number above 0, or null")
        for field in _AT_LEAST_0:
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"hardware.{field}: {getattr(self, field)}, must be a number of at least 0")
        for field in ("expert_tile_rows", "ranks_per_host_link", "ranks_per_socket", "ranks_per_node"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"hardware.{field}: {value}, must be at least 1")
        if not 0 <= self.host_link_processor_share <= 1:
            raise ValueError(
                f"hardware.host_link_processor_share: {self.host_link_processor_share}, must be between 0 and 1"
            )
        if not 0 < self.peer_efficiency <= 1:
            raise ValueError(f"hardware.peer_efficiency: {self.peer_efficiency}, must be above 0 and at most 1")
        self._validate_peers()
        if self.host_link == "emulated" and self.host_link_bytes_per_s is None:
            raise ValueError("hardware.host_link_bytes_per_s: null, must be set for hardware.host_link=emulated")

    def _validate_peers(self) -> None:
        links = self.peer_bytes_per_s
        if links is None:
            return
        num_ranks = len(links)
        if any(len(row) != num_ranks for row in links):
            raise ValueError(f"hardware.peer_bytes_per_s: {links}, must be as many rows as columns")
        if any(links[i][j] <= 0 for i in range(num_ranks) for j in range(num_ranks) if i != j):
            raise ValueError(f"hardware.peer_bytes_per_s: {links}, must be above 0 off the diagonal")
        if self.ranks_per_node is not None and self.ranks_per_node != num_ranks:
            raise ValueError(
                f"hardware.ranks_per_node: {self.ranks_per_node}, must be {num_ranks}, the size of peer_bytes_per_s"
            )

    def host_link_s(self, num_bytes: float) -> float:
        """Return how long the host link takes for a transfer.

        Raises:
            ValueError: its bandwidth is not known.
        """
        if self.host_link_bytes_per_s is None:
            raise ValueError("hardware.host_link_bytes_per_s: null, must be set or measured")
        return self.host_link_latency_s + num_bytes / self.host_link_bytes_per_s

    def expert_rate(self, width: float | None = None) -> float:
        """Return the rate of an expert's matrix products, in floating-point operations per second.

        Args:
            width: values that it keeps per token between its matrices; None: so many that they cost nothing.

        Raises:
            ValueError: the rate is not known.
        """
        if self.expert_flops_per_s is None:
            raise ValueError("hardware.expert_flops_per_s: null, must be set or measured")
        return self.expert_flops_per_s / (1 + (self.expert_half_rate_width / width if width else 0.0))

    def expert_cost(
        self,
        *,
        expert_bytes: int,
        flops_per_token: int,
        token_bytes: int = 0,
        width: float | None = None,
        exchange_bytes_per_s: float | None = None,
        sender_bytes_per_s: float | None = None,
        pair_bytes_per_s: float | None = None,
        world_size: int = 1,
    ) -> ExpertCost | None:
        """Return the costs of an expert, or None where this machine was not calibrated.

        Args:
            expert_bytes: size of its weights.
            flops_per_token: floating-point operations for one token.
            token_bytes: size of a token in an all-to-all.
            width: as for :meth:`expert_rate`.
            exchange_bytes_per_s: rate at which a rank sends in an exchange; None: ``all_to_all_bytes_per_s``, or over
                several nodes that of the network, which most tokens and weights then cross.
            sender_bytes_per_s: rate at which one rank sends weights to all others while these send none; None: as in an
                exchange.
            pair_bytes_per_s: rate at which it sends to one of them; None: the same.
            world_size: ranks, which may be on several nodes.
        """
        if self.expert_flops_per_s is None or self.host_link_bytes_per_s is None:
            return None
        inside, memory = self.all_to_all_bytes_per_s, self.device_memory_bytes_per_s
        exchange, latency_s, node_ranks = exchange_bytes_per_s or inside, self.all_to_all_latency_s, 0
        inside_share = network_share = 1.0
        if self.ranks_per_node is not None and world_size > self.ranks_per_node:
            network, latency_s = self.network_bytes_per_s or inside, latency_s + self.network_latency_s
            exchange, node_ranks = exchange_bytes_per_s or network, self.ranks_per_node
            if exchange is not None and network is not None:
                inside_share, network_share = exchange / (inside or network), exchange / network
        sender = sender_bytes_per_s or exchange
        cost = ExpertCost(
            token_s=flops_per_token / self.expert_rate(width),
            fetch_s=self.host_link_s(expert_bytes),
            exchange_token_s=0.0 if exchange is None else token_bytes / exchange,
            peer_fetch_s=0.0 if sender is None else latency_s + expert_bytes / sender,
            launch_s=self.expert_launch_s,
            weights_s=0.0 if memory is None else expert_bytes / memory,
            exchange_latency_s=latency_s,
            copy_token_s=0.0 if memory is None else 2 * token_bytes / memory,
            tile_tokens=self.expert_tile_rows,
            grouped=self.kernel != KernelName.LOOP,
            overlaps=not self.puts,
            early_s=self.early_s,
            node_ranks=node_ranks,
            inside_share=inside_share,
            network_share=network_share,
            copy_share=self.host_link_processor_share,
            pair_share=1.0 if pair_bytes_per_s is None or sender is None else max(1.0, sender / pair_bytes_per_s),
        )
        return replace(cost, **self._host_costs(expert_bytes, flops_per_token, token_bytes))

    def _host_costs(self, expert_bytes: int, flops_per_token: int, token_bytes: int) -> dict[str, Any]:
        """Return the fields of :class:`ExpertCost` about the host; none where it computes nothing."""
        if self.host_flops_per_s is None or self.host_link_bytes_per_s is None:
            return {}
        read_s = expert_bytes / self.host_weights_bytes_per_s if self.host_weights_bytes_per_s else 0.0
        return {
            "host_token_s": flops_per_token / self.host_flops_per_s + 2 * token_bytes / self.host_link_bytes_per_s,
            "host_launch_s": self.host_launch_s,
            "host_weights_s": read_s,
            "host_trip_s": 2 * self.host_link_latency_s,
        }
