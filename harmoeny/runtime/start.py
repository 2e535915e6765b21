"""Starts the runtime on one rank: puts together everything that MoE layers are executed with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from harmoeny.choices import Exchange, KernelName
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.runtime.calibrate import measure_expert_cost, with_host_cost
from harmoeny.runtime.calibrate_device import measure_device_cost
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.memory.experts import ExpertStore, LayerExperts
from harmoeny.runtime.memory.fetch.base import RankMemory
from harmoeny.runtime.memory.host import make_host
from harmoeny.runtime.memory.links import make_transfers
from harmoeny.runtime.memory.slots import SlotPool
from harmoeny.runtime.memory.transfer import Transfers


def start_rank(
    layers: Sequence[LayerExperts],
    comm: Communicator,
    hardware: Hardware | None = None,
    *,
    exchange: str = Exchange.AUTO,
    cost: ExpertCost | None = None,
    transfers: Transfers | None = None,
    kernel: str = KernelName.AUTO,
    host_threads: int = 0,
    record: bool = True,
) -> ExpertParallel:
    """Start the runtime on this rank; all ranks do it together. :meth:`ExpertParallel.close` undoes it.

    Args:
        layers: the experts of every MoE layer, in order of execution; where the device has memory of its own, their
            weights are pinned in place.
        comm: the ranks.
        hardware: its host link, and its calibration if it has one; None: this machine, unmeasured.
        exchange: how tokens travel, see :func:`~harmoeny.runtime.exchange.choose.open_exchange`.
        cost: what an expert costs; None: as the hardware's calibration says, else measured now.
        transfers: copies weights into slots; shared with others, so whoever made it closes it. None: one of its own.
        kernel: what computes experts; :func:`harmoeny.runtime.kernels.make_kernel` explains it.
        host_threads: threads that execute experts beside the device; 0: none do.
        record: take phase times.

    Raises:
        ValueError: the exchange is not possible here, or the kernel cannot compute these experts.
    """
    hardware = hardware or Hardware()
    device = comm.device
    with ExitStack() as resources:
        comm = open_exchange(comm, exchange)
        resources.callback(comm.close)
        store = ExpertStore(layers, pin=Device.of(device).has_own_memory)
        resources.callback(store.close)
        if transfers is None:
            transfers = make_transfers(device, hardware)
            resources.callback(transfers.close)
        host = make_host(device, hardware, host_threads) if host_threads else None
        if host is not None:
            resources.callback(host.close)
        if cost is None:
            cost = _calibrated_cost(layers[0], hardware) or _measured_cost(layers[0], comm, transfers, kernel)
            if host is not None and cost.host_token_s == 0:
                cost = with_host_cost(cost, layers[0], comm, transfers, host)
        memory = RankMemory(store, SlotPool(store, device), transfers, comm, cost, kernel, host)
        return ExpertParallel(memory, Recorder(device, enabled=record), resources.pop_all())


def _measured_cost(experts: LayerExperts, comm: Communicator, transfers: Transfers, kernel: str) -> ExpertCost:
    if Device.of(comm.device).has_own_memory:
        return measure_device_cost(experts, comm, transfers, kernel)
    return measure_expert_cost(experts, comm, transfers)


def _calibrated_cost(experts: LayerExperts, hardware: Hardware) -> ExpertCost | None:
    sample = next(iter(experts.weights.values()))
    return hardware.expert_cost(
        expert_bytes=experts.expert_bytes,
        flops_per_token=experts.flops_per_token,
        token_bytes=experts.hidden_size * sample.element_size(),
        width=experts.inner_width,
    )
