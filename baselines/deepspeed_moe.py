"""DeepSpeed-MoE, the real library: its MoE layer with our router's decisions and our experts' weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

import numpy as np
from packaging.version import Version

from baselines.kit.capacity import check_capacity_factor
from harmoeny.choices import Fetch, WorkOrder
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import Policy

#: Earlier versions expect something else of a gate.
_MINIMUM = "0.19.8"
_INSTALL = f"DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>={_MINIMUM}'"
#: DeepSpeed's default for the least capacity of an expert, where it drops.
_MIN_CAPACITY = 4

try:
    # Importing the library takes seconds, so that is left to the ranks that run it.
    _found = version("deepspeed")
except PackageNotFoundError as error:
    raise ImportError(f"deepspeed is not installed: {_INSTALL}") from error
if Version(_found) < Version(_MINIMUM):
    raise ImportError(f"deepspeed {_found} is too old: {_INSTALL}")


@dataclass(kw_only=True)
class DeepSpeedMoE(Policy):
    """Expert parallelism of DeepSpeed-MoE (Rajbhandari et al., ICML 2022, arXiv 2201.05596) without dropped tokens.

    Every rank sends every expert equally many rows: as many as the most that any rank has for any expert. What is above
    a rank's own assignments is zeros, which are sent, executed and sent back like the others.
    """

    name: ClassVar[str] = "deepspeed_moe"
    description: ClassVar[str] = "DeepSpeed's own layer: experts at home, all padded to the largest count"
    can_stage: ClassVar[bool] = False
    executor: ClassVar[str] = "baselines.executors.deepspeed:DeepSpeedExecutor"

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: an option for moving weights, which DeepSpeed does not do.
        """
        super().validate()
        for option, allowed in (("fetch", Fetch.ASYNC), ("num_slots", None), ("work_order", WorkOrder.COVERED)):
            if getattr(self, option) != allowed:
                raise ValueError(
                    f"{option}: {getattr(self, option)!r}, must be {allowed or 'null'}, the default: DeepSpeed holds "
                    "its experts and moves none"
                )

    def validate_ranks(self, num_experts: int, world_size: int) -> None:
        """Check that the ranks can hold equally many experts.

        Raises:
            ValueError: the number of ranks does not divide the number of experts.
        """
        if num_experts % world_size:
            raise ValueError(
                f"world_size: {world_size}, must divide {num_experts} (model.num_experts): "
                "DeepSpeed gives every rank equally many experts"
            )

    def capacity(self, counts: IntArray) -> int:
        """Return how many rows every rank sends every expert; ``counts``: int64 ``[world_size, num_experts]``."""
        return int(counts.max())

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Send what fits of ``counts`` (int64 ``[world_size, num_experts]``) to the home ranks."""
        kept = np.minimum(counts, self.capacity(counts))
        return plan_from_tokens(home_tokens(kept, placement.home), placement)


@dataclass(kw_only=True)
class DeepSpeedMoEDrop(DeepSpeedMoE):
    """DeepSpeed-MoE as it is trained: an expert takes a fixed number of assignments of every rank, the first ones.

    Attributes:
        capacity_factor: that number, in multiples of a rank's assignments over the number of experts.
    """

    name: ClassVar[str] = "deepspeed_moe_drop"
    description: ClassVar[str] = "DeepSpeed's own layer with a fixed capacity of experts (not exact)"
    exact: ClassVar[bool] = False

    capacity_factor: float = 1.0

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a capacity factor that is not a positive, finite number.
        """
        super().validate()
        check_capacity_factor(self.capacity_factor)

    def capacity(self, counts: IntArray) -> int:
        """Return the capacity for ``counts`` (int64 ``[world_size, num_experts]``): of the rank with most assignments.

        DeepSpeed takes a rank's own number of tokens, which must then be the same on all ranks.
        """
        most = int(counts.sum(axis=1).max())
        num_experts: int = counts.shape[1]
        return max(_MIN_CAPACITY, math.ceil(most / num_experts * self.capacity_factor))
