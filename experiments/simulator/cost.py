"""The cost model: how long every part of a layer takes on some hardware; docs/simulator.md has all formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from experiments.point.simulator_options import PLAN_TERMS, SoftwareCost
from experiments.routers.base import FloatArray
from experiments.simulator.model_work import ModelWork
from experiments.simulator.plan_size import PlanSize
from experiments.simulator.topology import Topology
from harmoeny.choices import KernelName
from harmoeny.hardware import Hardware
from harmoeny.placement import BoolArray, IntArray

#: Size of one count in the exchange of counts.
_COUNT_BYTES = 8


class CostModel:
    """Times of one system's work on one rank, or on all ranks at once.

    Attributes:
        work: what the model computes.
        topology: the links.
        software: what the implementation adds.
        expert: costs of an expert as schedules and policies see them.
        puts: whether rows arrive in the order of work.
        device_sharing: what ranks of one device take from each other.
        grouped: whether a wave of experts is computed at once.
    """

    def __init__(self, hardware: Hardware, topology: Topology, work: ModelWork, software: SoftwareCost) -> None:
        """Bring machine, model and software together.

        Raises:
            ValueError: the hardware lacks the rate of experts or of the host link.
        """
        expert = hardware.expert_cost(
            expert_bytes=work.expert_bytes, flops_per_token=work.flops_per_token, token_bytes=work.row_bytes,
            width=work.inner_width, exchange_bytes_per_s=topology.exchange_bytes_per_s(),
            sender_bytes_per_s=topology.sender_bytes_per_s(), pair_bytes_per_s=topology.pair_bytes_per_s(),
            world_size=topology.world_size,
        )  # fmt: skip
        if expert is None:
            raise ValueError(
                f"hardware: {hardware.name!r}, must have expert_flops_per_s and host_link_bytes_per_s to be simulated"
            )
        together_s = topology.host_fetch_s(work.expert_bytes, np.ones(topology.world_size, dtype=np.int64))
        links = topology.links(work.expert_bytes)
        self.expert = replace(expert, fetch_together_s=float(together_s.max()), links=links, relays=True)
        self.work, self.topology, self.software = work, topology, software
        self._hardware = hardware
        self.puts, self.device_sharing = hardware.puts, hardware.device_sharing
        self.grouped = hardware.kernel != KernelName.LOOP
        self._bytes_per_s = hardware.device_memory_bytes_per_s or np.inf
        self._dense_flops_per_s = hardware.dense_flops_per_s or hardware.expert_rate()
        self._tile_s = hardware.expert_tile_rows * self.expert.token_s
        self._weights_s = work.expert_bytes / self._bytes_per_s

    def of(self, work: ModelWork) -> CostModel:
        """Return the same for another number of tokens per rank."""
        return CostModel(self._hardware, self.topology, work, self.software)

    @cached_property
    def dense_s(self) -> list[float]:
        """Per MoE layer the time of the model before it, and at the end that after the last."""
        return [self._operators_s(table) for table in self.work.dense]

    @cached_property
    def route_s(self) -> list[float]:
        """Per MoE layer the time of its router, and what the software and this runtime take for the layer."""
        layer_s = self.software.layer_s + self._hardware.runtime_layer_s
        return [
            self._operators_s(table) + layer_s + self.software.token_s * num_tokens
            for table, num_tokens in zip(self.work.route, self.work.layer_tokens, strict=True)
        ]

    @cached_property
    def metadata_s(self) -> float:
        """Time of the exchange of counts once all ranks take part: every rank sends its own to all."""
        world_size = self.topology.world_size
        if world_size == 1:
            return 0.0
        sent = np.full((world_size, world_size), float(_COUNT_BYTES * self.work.all_experts))
        return float(self.topology.exchange_s(sent).max())

    def plan_s(self, policy_s: float | None, size: PlanSize) -> float:
        """Return the time of a plan (see :class:`SoftwareCost`).

        Args:
            policy_s: what the policy itself takes, as timed, to which only steps are added; None: as the software says.
            size: how large it is.
        """
        software = self.software
        if policy_s is not None:
            return policy_s + software.plan_step_s * size.num_steps
        return sum((getattr(software, name) or 0.0) * n for name, n in zip(PLAN_TERMS, size.terms, strict=True))

    def experts_s(self, executed: IntArray) -> FloatArray:
        """Return the time of ranks that hold all they execute.

        Args:
            executed: int64 ``[num_stages, num_experts, world_size]``, tokens; stages follow one another.

        Returns:
            float64 ``[world_size]``.
        """
        busy_s = self._busy_s(executed)
        if not self.grouped:
            seconds = np.where(executed > 0, self._hardware.expert_launch_s + np.maximum(busy_s, self._weights_s), 0.0)
            return np.asarray(seconds.sum(axis=(0, 1)))
        active = (executed > 0).sum(axis=1)
        waves_s = np.where(active > 0, self._hardware.expert_launch_s, 0.0)
        return np.asarray((waves_s + np.maximum(busy_s.sum(axis=1), active * self._weights_s)).sum(axis=0))

    def wave_s(self, num_tokens: Sequence[int]) -> float:
        """Return the time of one wave; ``num_tokens``: those of every expert in it, at least 1 each.

        ``launch + max(tokens * flops / rate, weights / memory bandwidth)``, where the tokens of an expert are filled up
        to tiles, and both terms are sums over the wave: one call computes all of it. Rows that do not stay in the
        cache may take longer (:meth:`_busy_s`).
        """
        if self._hardware.cache_bytes is None:  # the same in less time, which simulations of many fetches need
            busy_s = sum(-(-n // self._hardware.expert_tile_rows) for n in num_tokens) * self._tile_s
        else:
            busy_s = float(self._busy_s(np.asarray(num_tokens, dtype=np.int64)).sum())
        return self._hardware.expert_launch_s + max(busy_s, len(num_tokens) * self._weights_s)

    def _busy_s(self, num_tokens: IntArray) -> FloatArray:
        """Return the time of the products of every slice, beside reading its weights.

        Rows that do not stay in the cache are read from memory once per tile of columns, over both matrices as many
        bytes per row as the weights have per column of a tile.

        Args:
            num_tokens: int64, of any shape, tokens of every slice.
        """
        hardware = self._hardware
        tiles = -(-num_tokens // hardware.expert_tile_rows)
        busy_s: FloatArray = np.multiply(tiles, self._tile_s, dtype=np.float64)
        if hardware.cache_bytes is None:
            return busy_s
        read_s = np.multiply(num_tokens, self._weights_s / hardware.expert_tile_rows, dtype=np.float64)
        large = num_tokens * self.work.row_bytes > hardware.cache_bytes
        return np.where(large, np.maximum(busy_s, read_s), busy_s)

    def exchange_s(self, rows: FloatArray) -> FloatArray:
        """Return when every rank has finished an all-to-all; ``rows``: ``[world_size(src), world_size(dst)]``."""
        return self.topology.exchange_s(rows * float(self.work.row_bytes))

    def copy_s(self, rows: IntArray | FloatArray) -> FloatArray:
        """Return the time per rank to reorder so many rows in device memory: all are read and written once."""
        return rows.astype(np.float64) * (2.0 * self.work.row_bytes / self._bytes_per_s)

    def gather_by_product_s(self, num_tokens: int, capacity: int) -> float:
        """Return the time in which a padding system brings tokens to their places by a matrix product, or back.

        ``2 * tokens * (experts * capacity) * hidden_size`` operations.
        """
        flops = 2.0 * num_tokens * self.work.num_experts * capacity * self.work.hidden_size
        return flops / self._dense_flops_per_s

    def weights_from_peers_s(self, sent: Mapping[tuple[int, int], float]) -> FloatArray:
        """Return when every rank has its weights; ``sent``: number of experts by (src, dst)."""
        matrix = np.zeros((self.topology.world_size,) * 2)
        for (src, dst), number in sent.items():
            matrix[src, dst] = number * self.work.expert_bytes
        return self.topology.exchange_s(matrix)

    def weights_handed_on_s(self, senders: IntArray, home: IntArray, halved: BoolArray | None = None) -> FloatArray:
        """Return when every rank has its weights, where ranks hand on what they fetch; arguments as of a plan."""
        return self.topology.handed_on_s(self.work.expert_bytes, senders, home, halved)

    def weights_from_host_s(self, num_fetches: IntArray | FloatArray) -> FloatArray:
        """Return the time of one fetch per rank; ``num_fetches``: ``[world_size]``, halves count as such."""
        return self.topology.host_fetch_s(self.work.expert_bytes, num_fetches)

    def _operators_s(self, operators: Sequence[Sequence[float]] | FloatArray) -> float:
        """Return ``sum over operators of max(operator_s, flops / rate, bytes / memory bandwidth)``."""
        table = np.asarray(operators, dtype=np.float64)
        if not len(table):
            return 0.0
        busy_s = np.maximum(table[:, 0] / self._dense_flops_per_s, table[:, 1] / self._bytes_per_s)
        return float(np.maximum(busy_s, self._hardware.operator_s).sum())
