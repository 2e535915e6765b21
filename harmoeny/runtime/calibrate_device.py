"""What experts cost on a device with memory of its own: waves that are launched at once, links with a start and a rate.

There a slice of few rows takes as long as reading its weights does, launches take longer than many slices, and what an
exchange costs before its first row is more than what thousands of rows add. So everything is measured at two sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from harmoeny.choices import KernelName
from harmoeny.cost import ExpertCost
from harmoeny.head_start import HeadStart
from harmoeny.placement import IntArray
from harmoeny.runtime.calibrate import (
    cold_caches,
    expert_s,
    fetch_s,
    fetch_together_s,
    fit_expert,
    mean_cost,
    median_s,
    random_rows,
)
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.by_slot import SlotRows, slots_by_expert, sum_by_token
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.dispatch import count_assignments
from harmoeny.runtime.exchange.early import early_by_slot
from harmoeny.runtime.exchange.order import Assignments
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.slots import LayerSlots, Slot
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers

#: Experts of a measured wave, and what their weights may take.
_MOST_SLICES, _MOST_BYTES = 16, 2**30
#: Rows of a measured wave, of which a device computes as many at a time as it ever does.
_FEW_ROWS, _MOST_ROWS = 4096, 65536
#: Rows, and experts of a token, where it is measured what executing rows before there is a plan takes.
EARLY_ROWS, _TOP_K = 4096, 4
_TIMES_AS_LONG = 2.0
#: Rows that every rank sends each other, few and many.
_SENT_ROWS = (256, 8192)
#: Experts that every rank sends the next one, few and many.
_SENT_EXPERTS = (1, 3)
_REPEATS = 7


class WaveCost(NamedTuple):
    """What a wave costs, in seconds: ``launch_s + max(rows * token_s, slices * weights_s)``."""

    launch_s: float
    token_s: float
    weights_s: float


class LinkCost(NamedTuple):
    """What moving rows costs, in seconds.

    Attributes:
        latency_s: an exchange, whatever its rows.
        token_s: a row to or from another rank, beside its copying.
        copy_s: copying a row within the device's memory; every row of an exchange is copied when it is sent and when it
            is put in order.
    """

    latency_s: float
    token_s: float
    copy_s: float


NO_LINK = LinkCost(0.0, 0.0, 0.0)


def measure_device_cost(
    experts: LayerExperts, comm: Communicator, transfers: Transfers, kernel: str = KernelName.AUTO
) -> ExpertCost:
    """Measure one layer's experts on all ranks at once, so that they share links and memory as they do in a run.

    Args:
        experts: the layer.
        comm: the ranks.
        transfers: what copies experts in the run.
        kernel: what computes them in the run; :func:`harmoeny.runtime.kernels.make_kernel` explains it.

    Returns:
        The mean over ranks of their medians, the same on every rank.

    Raises:
        ValueError: the kernel cannot compute these experts here.
    """
    comm.barrier()
    slots = LayerSlots(experts, comm.device)
    slot = slots.reserve(slices_in_wave(experts))[0]
    computes = make_kernel(kernel, slots, filled=transfers.fills_slots)
    if isinstance(computes, GroupedKernel):
        wave = measure_wave(computes, transfers)
    else:
        launch_s, token_s = fit_expert(lambda num_tokens: expert_s(experts, slot, transfers, num_tokens))
        wave = WaveCost(launch_s, token_s, 0.0)
    comm.barrier()  # ranks may share the link
    host_fetch_s = fetch_s(experts, slot, transfers)
    link, peer_s, together_s, early_s = NO_LINK, 0.0, 0.0, 0.0
    if comm.world_size > 1:
        if isinstance(computes, GroupedKernel):
            early_s = measure_early(computes, comm)
        together_s = fetch_together_s(experts, slot, transfers, comm, host_fetch_s)
        link = measure_link(experts, comm)
        peer_s = link.latency_s + measure_peer_fetch(slots, comm, transfers)
    cost = ExpertCost(
        token_s=wave.token_s, fetch_s=host_fetch_s, exchange_token_s=link.token_s, peer_fetch_s=peer_s,
        launch_s=wave.launch_s, weights_s=wave.weights_s, exchange_latency_s=link.latency_s, copy_token_s=link.copy_s,
        grouped=computes.grouped, overlaps=comm.overlaps, fetch_together_s=together_s,
        early_s=early_s,
    )  # fmt: skip
    return mean_cost(cost, comm)


def slices_in_wave(experts: LayerExperts) -> int:
    """Return how many experts of a layer are measured in a wave."""
    return max(1, min(experts.num_experts, _MOST_SLICES, _MOST_BYTES // experts.expert_bytes))


def measure_wave(kernel: GroupedKernel, transfers: Transfers) -> WaveCost:
    """Measure waves of a kernel whose slots hold nothing yet; caches are cold, as every layer's weights find them.

    Args:
        kernel: with :func:`slices_in_wave` slots.
        transfers: what copies experts in the run.
    """
    slots = kernel.slots
    experts, device = slots.experts, slots.device
    for slot in slots.slots:
        transfers.submit(CopyRequest(slot, slot.index, experts.expert(slot.index)))
        transfers.wait(slot)
    many = random_rows(experts, _FEW_ROWS, device)
    clear = cold_caches(device)

    def wave_s(num_slices: int, num_tokens: int) -> float:
        rows = many.repeat(-(-num_slices * num_tokens // len(many)), 1)[: num_slices * num_tokens]
        tokens = np.where(np.arange(len(slots.slots)) < num_slices, num_tokens, 0)
        ends = Device.of(device).upload(tokens.cumsum().astype(np.int32))
        return median_s(lambda _: kernel.apply(rows, ends), device, before=clear)

    return fit_wave(wave_s, len(slots.slots))


def measure_early(kernel: GroupedKernel, comm: Communicator) -> float:
    """Return what a head start takes beside the products of its rows, in seconds; all ranks together, as in a run.

    Args:
        kernel: of slots that hold experts, as :func:`measure_wave` leaves them.
        comm: the ranks.
    """
    experts, num_slots = kernel.slots.experts, len(kernel.slots.slots)
    hidden_TH = random_rows(experts, EARLY_ROWS, comm.device)
    num_held = min(num_slots, experts.num_experts)
    expert_ids_TK = torch.arange(EARLY_ROWS)[:, None] + torch.arange(min(_TOP_K, num_held))
    expert_ids_TK = expert_ids_TK.remainder(num_held).to(comm.device)
    weights_TK = torch.ones_like(expert_ids_TK, dtype=hidden_TH.dtype)
    slot_of_E = slots_by_expert({expert: expert for expert in range(num_held)}, experts.num_experts, comm.device)
    counts_E, numbers_TK = count_assignments(expert_ids_TK, experts.num_experts)
    head_start = HeadStart(EARLY_ROWS, slice_rows=0, least_rows=1, tile_rows=1, batch_rows=expert_ids_TK.numel())
    output_TH = torch.zeros_like(hidden_TH)

    def divide() -> SlotRows:
        return early_by_slot(
            hidden_TH, expert_ids_TK, numbers_TK, counts_E, slot_of_E, num_held, num_slots, head_start
        ).by_slot

    def begin() -> None:
        by_slot = divide()
        results_RH = kernel.apply(by_slot.rows_RH, by_slot.ends)
        sum_by_token(results_RH, weights_TK, by_slot.row_TK, onto=output_TH)

    chosen = divide()
    whole_s, products_s = (
        median_s(action, comm.device, before=comm.barrier)
        for action in (lambda _: begin(), lambda _: kernel.apply(chosen.rows_RH, chosen.ends))
    )
    return max(0.0, whole_s - products_s)


def fit_wave(wave_s: Callable[[int, int], float], num_slices: int) -> WaveCost:
    """Return what explains the times of waves.

    Args:
        wave_s: measures a wave of so many slices of so many tokens each, in seconds.
        num_slices: the most that it takes.
    """
    one_s, all_s = wave_s(1, 1), wave_s(num_slices, 1)
    # A single expert cannot tell its weights from the launch; then they are part of it.
    weights_s = max(0.0, (all_s - one_s) / (num_slices - 1)) if num_slices > 1 else 0.0
    few = max(1, _FEW_ROWS // num_slices)
    few_s = wave_s(num_slices, few)
    while few_s < _TIMES_AS_LONG * all_s and 2 * few * num_slices < _MOST_ROWS:
        few *= 2
        few_s = wave_s(num_slices, few)
    many_s = wave_s(num_slices, 2 * few)
    token_s = (many_s - few_s) / (few * num_slices)
    if token_s <= 0:  # noise
        token_s = many_s / (2 * few * num_slices)
    return WaveCost(max(0.0, one_s - weights_s), token_s, weights_s)


def measure_link(experts: LayerExperts, comm: Communicator) -> LinkCost:
    """Measure exchanges of rows between all ranks, and of as many that stay where they are; all ranks together."""
    sample, num_ranks = next(iter(experts.weights.values())), comm.world_size
    own, others = np.eye(num_ranks, dtype=np.int64), 1 - np.eye(num_ranks, dtype=np.int64)

    def exchange_s(tokens_WW: IntArray) -> float:
        num_rows = int(tokens_WW[comm.rank].sum())
        rows = torch.zeros(num_rows, experts.hidden_size, dtype=sample.dtype, device=comm.device)
        # Every destination is an expert of its own.
        tokens_WEW = tokens_WW[:, :, None] * own[None]
        sent_E = tokens_WW[comm.rank]
        expert_ids_T1 = torch.from_numpy(np.repeat(np.arange(num_ranks), sent_E)[:, None]).to(comm.device)
        given = (rows, Assignments(expert_ids_T1, sent_E), tokens_WEW)
        return median_s(lambda _: comm.send_rows(*given), comm.device, before=comm.barrier)

    few, many = ((num_ranks - 1) * n for n in _SENT_ROWS)
    apart = [exchange_s(n * others) for n in _SENT_ROWS]
    at_home = [exchange_s(n * own) for n in (few, many)]
    return fit_link(apart, at_home, few, many)


def fit_link(apart: list[float], at_home: list[float], few: int, many: int) -> LinkCost:
    """Return what explains the times of exchanges.

    Args:
        apart: seconds in which every rank sends others ``few`` rows in all, and ``many``.
        at_home: likewise, but the rows stay.
        few: rows.
        many: more rows.
    """
    sent_s, kept_s = (max(0.0, times[1] - times[0]) / (many - few) for times in (apart, at_home))
    if sent_s == 0:  # noise
        sent_s = apart[1] / many
    kept_s = min(kept_s, sent_s)
    # Ranks that share a device's memory send no slower than they copy; yet sending is never free.
    return LinkCost(max(0.0, apart[0] - few * sent_s), max(sent_s - kept_s, 0.01 * sent_s), kept_s / 2)


def measure_peer_fetch(slots: LayerSlots, comm: Communicator, transfers: Transfers) -> float:
    """Return how long an expert takes from rank to rank once it is under way, in seconds; all ranks together.

    Every rank sends to the next one at once, from its slots, as in a run.

    Args:
        slots: the first of them holds an expert.
        comm: the ranks.
        transfers: what copies experts in the run.
    """
    slot, receivers = slots.slots[0], LayerSlots(slots.experts, comm.device).reserve(max(_SENT_EXPERTS))
    times = []
    for n in _SENT_EXPERTS:
        taken = [_send_s(receivers[:n], slot, comm, transfers) for _ in range(_REPEATS + 1)]
        times.append(median(taken[1:]))
    (few, many), (few_s, many_s) = _SENT_EXPERTS, times
    return max((many_s - few_s) / (many - few), 0.01 * many_s / many)


def _send_s(receivers: Sequence[Slot], slot: Slot, comm: Communicator, transfers: Transfers) -> float:
    """Send the expert in a slot as often as there are receivers to the next rank, and wait for as many from the last.

    Returns:
        Seconds until all are in the receivers.
    """
    after, before = ((comm.rank + step) % comm.world_size for step in (1, -1))
    weights = dict(slot.weights)
    comm.reserve(len(receivers) * slot.expert_bytes, len(receivers) * len(weights))
    comm.barrier()
    begin = time.perf_counter()
    names = [name for _ in receivers for name in weights]
    buffers, copies = comm.exchange_tensors(
        [(weights[name], after) for name in names], [(weights[name], before) for name in names], transfers.beside
    )
    parts = iter(zip(buffers, copies.receiving, strict=True))
    for receiver in receivers:
        arriving = {name: next(parts) for name in weights}
        works = [work for _, of_weight in arriving.values() for work in of_weight]
        source = {name: buffer for name, (buffer, _) in arriving.items()}
        transfers.submit(CopyRequest(receiver, 0, source, arrival=partial(_wait_all, works)))
    for receiver in receivers:
        transfers.wait(receiver)
    _wait_all(copies.sending)
    Device.of(comm.device).synchronize()
    return time.perf_counter() - begin


def _wait_all(works: list[Any]) -> None:
    while works:  # each can be waited for only once
        works.pop().wait()
