"""``backend=ranks``: real processes on this machine, each of which measures its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from experiments.launch.environment import check_gloo_interface, joined_world_size
from experiments.launch.local import launch
from experiments.launch.mps import CONTROL, find_daemon
from experiments.point.options import GpuSharing
from experiments.point.point import Point
from experiments.results.begun import BegunRun
from experiments.text.tokens import TokenFile
from harmoeny.runtime.device import Device


class Ranks:
    """Measures on real ranks that it starts; those that torchrun or SLURM started join instead (joined.py)."""

    name: ClassVar[str] = "ranks"
    simulated: ClassVar[bool] = False

    def check(self, point: Point) -> None:
        """Refuse links that are taken to be others; what else ranks need depends on the host.

        Raises:
            ValueError: ``hardware.link_factor``.
        """
        factor = point.options.hardware.get("link_factor", 1.0)
        if factor != 1.0:
            raise ValueError(
                f"hardware.link_factor: {factor}, must be 1 with backend=ranks, whose links are as fast as they are; "
                "what_if of other links is for simulations"
            )

    def check_host(self, point: Point) -> None:
        """Refuse more ranks than were started, and devices that are not here.

        Raises:
            ValueError: ``world_size``, ``device``, ``ranks_per_gpu`` or ``GLOO_SOCKET_IFNAME``.
        """
        check_gloo_interface()
        joined, world_size = joined_world_size(), point.options.world_size
        if joined is not None and joined != world_size:
            raise ValueError(f"world_size: {world_size}, must be {joined}, the number of ranks that were started")
        num_here = Device.of(torch.device(point.device_type)).num_here
        if num_here == 0:
            raise ValueError(f"device: {point.device_type!r}, must be cpu or auto: this PyTorch sees no CUDA device")
        if num_here is not None and point.hardware.host_link == "emulated":
            raise ValueError(
                "hardware.host_link: 'emulated', must be memcpy with device=cuda (as hardware=measured has it): a GPU "
                "has a link of its own"
            )
        ranks_per_gpu = point.options.ranks_per_gpu
        if num_here is not None and joined is None and world_size > num_here * ranks_per_gpu:
            each = f" with ranks_per_gpu={ranks_per_gpu}" if ranks_per_gpu > 1 else ""
            raise ValueError(
                f"world_size: {world_size}, must be at most {num_here * ranks_per_gpu}, the CUDA devices here{each}"
            )
        if ranks_per_gpu > 1:
            _check_sharing(point, joined=joined is not None)

    def run(self, runs: Sequence[BegunRun], tokens: TokenFile | None) -> None:
        """Start the ranks and wait for them.

        Raises:
            RanksError: a rank failed; all others were stopped.
            InterruptedRun: this process was told to stop; all ranks were stopped.
        """
        assert tokens is not None, "real ranks read text"
        launch(runs, tokens)


def _check_sharing(point: Point, *, joined: bool) -> None:
    """Refuse ranks that share GPUs where that is not possible."""
    refused = f"ranks_per_gpu: {point.options.ranks_per_gpu}, must be 1"
    if point.device_type != "cuda":
        raise ValueError(f"{refused} with device=cpu")
    if joined:
        raise ValueError(
            f"{refused} where torchrun or SLURM started the ranks: their shares are given before they start"
        )
    if point.options.gpu_sharing == GpuSharing.MPS and not find_daemon():
        raise ValueError(f"{refused} here: there is no {CONTROL}; with gpu_sharing=time_sliced ranks take turns")
