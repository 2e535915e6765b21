"""What fits on a small device: slots for experts in the memory that is given, and what is done about the others."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from harmoeny.cost import ExpertCost
from harmoeny.timed import HarMoEny

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*")
#: Share of the memory that is left to activations, and to the keys and values of what is generated.
_KEPT_SHARE = 1 / 8


def parse_bytes(amount: str | int) -> int:
    """Return a number of bytes, given as such or as text: ``8GiB``, ``500 MB``.

    Raises:
        ValueError: it is neither.
    """
    found = _AMOUNT.fullmatch(str(amount))
    if found is None or found[2] not in _UNITS or (num_bytes := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise ValueError(f"device_memory: {amount!r}, must be a number of bytes, or one with its unit, as '8GiB'")
    return num_bytes


@dataclass(frozen=True)
class Budget:
    """A device's memory, and what has to fit in.

    Attributes:
        device_bytes: all of it.
        other_bytes: the model's weights beside the experts'.
        slot_bytes: one expert of every layer.
        num_layers: MoE layers.
        num_experts: experts of a layer, the most where layers differ.
        world_size: ranks, each with such a device.
    """

    device_bytes: int
    other_bytes: int
    slot_bytes: int
    num_layers: int
    num_experts: int
    world_size: int

    @property
    def num_homes(self) -> int:
        """Experts of a layer whose home is a rank, at most."""
        return -(-self.num_experts // self.world_size)

    @property
    def kept_bytes(self) -> int:
        """What is left to activations, keys and values."""
        return int(self.device_bytes * _KEPT_SHARE)

    @property
    def num_slots(self) -> int:
        """Experts of every layer that a rank has room for; no more than there are.

        Raises:
            ValueError: not even for one.
        """
        free = self.device_bytes - self.kept_bytes - self.other_bytes
        if free < self.slot_bytes:
            least = (self.other_bytes + self.slot_bytes) / (1 - _KEPT_SHARE)
            raise ValueError(
                f"device_memory: {_text(self.device_bytes)}, must be at least {_text(least + 1)}: "
                f"{_text(self.other_bytes)} for the weights beside the experts', {_text(self.slot_bytes)} for one of "
                f"the experts of every layer, and an eighth for activations, keys and values"
            )
        return min(free // self.slot_bytes, self.num_experts)

    def policy(self) -> HarMoEny:
        """Return HarMoEny with all slots that there are: a cache where they are fewer than a rank's own experts."""
        spare = self.num_slots - self.num_homes
        return HarMoEny(num_slots=self.num_slots) if spare < 0 else HarMoEny(spare_slots=spare)

    def host_threads(self, device: torch.device, ranks_here: int) -> int:
        """Return the threads that execute experts on the host of a rank: 0 where all of its own fit on the device.

        Args:
            device: the rank's. Beside a processor that plays the device it is half of the threads.
            ranks_here: ranks that share the host.
        """
        if self.num_slots >= self.num_homes:
            return 0
        if device.type == "cpu":
            return max(torch.get_num_threads() // 2, 1)
        return max(len(os.sched_getaffinity(0)) // ranks_here - 1, 1)

    def describe(self, cost: ExpertCost, host_threads: int) -> str:
        """Return what was chosen and why, in a sentence or two.

        Args:
            cost: of this machine, as calibrated.
            host_threads: threads of the host.
        """
        used = self.slot_bytes * self.num_slots
        chosen = (
            f"harmoeny: {self.num_slots} of {self.num_experts} experts in each of {self.num_layers} layers "
            f"({_text(used)}) beside {_text(self.other_bytes)} of other weights in {_text(self.device_bytes)}"
        )
        if not host_threads:
            return f"{chosen}; all experts of a rank are on its device"
        return (
            f"{chosen}; the others are fetched ({cost.fetch_s * 1e3:.3g} ms) or computed on the host "
            f"({cost.host_s([1]) * 1e3:.3g} ms for one token, threads: {host_threads}), whichever is sooner"
        )


def _text(num_bytes: float) -> str:
    """Return a number of bytes for people, in the largest unit that leaves a whole number before the point."""
    units = [unit for unit in ("TiB", "GiB", "MiB", "KiB") if num_bytes >= _UNITS[unit]]
    return f"{num_bytes / _UNITS[units[0]]:.3g} {units[0]}" if units else f"{num_bytes:.0f} B"
