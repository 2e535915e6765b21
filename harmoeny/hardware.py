"""What is known of the machine that ranks run on: measured by calibration, or given to emulate another one."""

from __future__ import annotations

from dataclasses import dataclass

from harmoeny.policy import ExpertCost

HOST_LINKS = ("memcpy", "emulated")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine.

    Attributes:
        name: its name in records.
        host_link: on a CPU, what brings an expert from the store to a slot: ``memcpy`` (the processor copies) or
            ``emulated`` (a load takes the time of the link below, without using the processor). CUDA uses its own link.
        host_link_bytes_per_s: bandwidth from host to device memory; null where it was not measured.
        host_link_latency_s: time of a transfer of no bytes.
        expert_flops_per_s: rate of an expert's matrix products on one rank; null where it was not measured.
        expert_launch_s: time that an expert takes whatever its tokens.
        all_to_all_bytes_per_s: rate at which a rank sends in an all-to-all; null where it was not measured.
        all_to_all_latency_s: time of an all-to-all of no bytes.
    """

    name: str = "unnamed"
    host_link: str = "memcpy"
    host_link_bytes_per_s: float | None = None
    host_link_latency_s: float = 0.0
    expert_flops_per_s: float | None = None
    expert_launch_s: float = 0.0
    all_to_all_bytes_per_s: float | None = None
    all_to_all_latency_s: float = 0.0

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        if self.host_link not in HOST_LINKS:
            raise ValueError(f"hardware.host_link: {self.host_link!r}, must be one of {', '.join(HOST_LINKS)}")
        for field in ("host_link_bytes_per_s", "expert_flops_per_s", "all_to_all_bytes_per_s"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"hardware.{field}: {value}, must be a number above 0, or null")
        for field in ("host_link_latency_s", "expert_launch_s", "all_to_all_latency_s"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"hardware.{field}: {getattr(self, field)}, must be a number of at least 0")
        if self.host_link == "emulated" and self.host_link_bytes_per_s is None:
            raise ValueError("hardware.host_link_bytes_per_s: null, must be set for hardware.host_link=emulated")

    def host_link_s(self, num_bytes: float) -> float:
        """Return how long the host link takes for a transfer.

        Raises:
            ValueError: its bandwidth is not known.
        """
        if self.host_link_bytes_per_s is None:
            raise ValueError("hardware.host_link_bytes_per_s: null, must be set or measured")
        return self.host_link_latency_s + num_bytes / self.host_link_bytes_per_s

    def expert_cost(self, *, expert_bytes: int, flops_per_token: int) -> ExpertCost | None:
        """Return the costs of an expert, or None where this machine was not calibrated.

        Args:
            expert_bytes: size of its weights.
            flops_per_token: floating-point operations for one token.
        """
        if self.expert_flops_per_s is None or self.host_link_bytes_per_s is None:
            return None
        return ExpertCost(token_s=flops_per_token / self.expert_flops_per_s, fetch_s=self.host_link_s(expert_bytes))
