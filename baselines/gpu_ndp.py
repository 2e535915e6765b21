"""GPU-NDP: near-memory processors compute what the GPU does not hold; a prompt says what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.cache import CachePolicy, filled_with
from baselines.kit.with_host import WithHost
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement, hold_highest
from harmoeny.places import PlaceCosts, device_slice_s, host_slice_s


@dataclass(kw_only=True)
class GpuNdp(WithHost, CachePolicy):
    """A GPU beside processors in the memory (Wu et al., DATE 2026, arXiv 2601.03992), which are the rank's host here.

    In every layer experts are assigned one by one, those with the most tokens first, to whoever would end sooner with
    them; the GPU has to wait for weights that it does not hold. A prompt's own prefill says which experts it holds
    until the next one: those with the most tokens.

    Attributes:
        cap: slots of a layer, at most, that a prompt fills; null: all. The others keep what they hold.
    """

    name: ClassVar[str] = "gpu_ndp"
    description: ClassVar[str] = "shares experts out over device and host by who ends sooner; a prompt fills the slots"

    cap: int | None = None

    @property
    def history_window(self) -> int:
        """The latest batch and the one before it, which tell prompts from the tokens that follow."""
        return 2

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a cap below 0.
        """
        super().validate()
        if self.cap is not None and self.cap < 0:
            raise ValueError(f"cap: {self.cap}, must be at least 0, or null for all slots")

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return what the processors in the memory take.

        Raises:
            ValueError: the policy was not calibrated.
        """
        costs = self.costs()
        return assign_in_turn(executed, placement.resident, costs)

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Hold a prompt's most popular experts behind its prefill, a batch with more tokens than the one before."""
        counts: IntArray = history[-1].sum(axis=0)
        if self.num_slots is None or (len(history) > 1 and counts.sum() <= history[-2].sum()):
            return None
        popular = np.zeros_like(placement.resident)
        most = self.num_slots if self.cap is None else min(self.cap, self.num_slots)
        if most > 0:
            popular = hold_highest(counts / 1.0, placement.at_home & (counts > 0)[:, None], most)
        return filled_with(popular, placement, self.num_slots)


@compiled
def assign_in_turn(executed: IntArray, resident: BoolArray, costs: PlaceCosts) -> BoolArray:
    """Assign every rank's experts, those with the most tokens first, to its device or its host, whichever ends sooner.

    Args:
        executed: int64 ``[num_experts, world_size]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``, what is in its slots.
        costs: the machine's.

    Returns:
        bool ``[num_experts, world_size]``, what hosts execute.
    """
    num_experts, world_size = executed.shape
    host = np.zeros((num_experts, world_size), dtype=np.bool_)
    for rank in range(world_size):
        device_s, link_s, host_s = 0.0, 0.0, costs.host_trip_s
        for expert in np.argsort(-executed[:, rank], kind="mergesort"):
            num_tokens = executed[expert, rank]
            if num_tokens == 0:
                break
            there_s = link_s if resident[expert, rank] else link_s + costs.fetch_s
            ready_s = device_s if resident[expert, rank] else max(device_s, there_s)
            device_end_s = ready_s + device_slice_s(num_tokens, costs)
            host_end_s = host_s + host_slice_s(num_tokens, costs)
            if device_end_s <= host_end_s:
                device_s, link_s = device_end_s, there_s
            else:
                host_s, host[expert, rank] = host_end_s, True
    return host
