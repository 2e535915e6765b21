"""What an expert costs on this machine: time per token, per fetch and per token sent, measured on real weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from socket import gethostname
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.choices import Exchange
from harmoeny.cores import usable_cores
from harmoeny.cost import ExpertCost
from harmoeny.runtime.device import Device, span_s
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.order import Assignments
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.host import Host
from harmoeny.runtime.memory.slots import LayerSlots, Slot
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers
from harmoeny.runtime.memory.waves import HostSlice

_TOKENS = 512
#: Slices whose times give what a token costs: a small one, and one that takes at least so many times as long.
_FEW_TOKENS, _MOST_TOKENS = 128, 32768
_TIMES_AS_LONG = 2.0
#: Slices, at most, that device and host execute one after the other while both are timed.
_MOST_IN_A_ROW = 4
_REPEATS = 7
#: How long ranks copy at the same time, and the most copies of each.
_TOGETHER_S, _MOST_TOGETHER = 5e-3, 256
#: Fields of :class:`ExpertCost` that ranks measure.
_MEASURED = (
    "token_s", "fetch_s", "exchange_token_s", "peer_fetch_s", "launch_s", "weights_s", "exchange_latency_s",
    "copy_token_s", "fetch_together_s", "early_s", "copy_share", "idle_speedup",
)  # fmt: skip
#: Copies beside a slice that takes about twice as long as all of them.
_NUM_BESIDE = 2
#: More than the caches of a processor or a device hold.
_SCRATCH_BYTES = 64 * 2**20


def measure_expert_cost(experts: LayerExperts, comm: Communicator, transfers: Transfers) -> ExpertCost:
    """Measure one layer's experts on all ranks at once, so that they share memory bandwidth as they do in a run.

    Args:
        experts: the layer.
        comm: the ranks.
        transfers: what copies experts in the run.

    Returns:
        The mean over ranks of their medians, the same on every rank.
    """
    comm.barrier()
    slots = LayerSlots(experts, comm.device).reserve(1 + _NUM_BESIDE)
    slot = slots[0]
    launch_s, token_s = fit_expert(lambda num_tokens: expert_s(experts, slot, transfers, num_tokens))
    cost = ExpertCost(token_s=token_s, fetch_s=fetch_s(experts, slot, transfers), launch_s=launch_s)
    if transfers.fills_slots:
        num_tokens = min(max(1, round(2 * _NUM_BESIDE * cost.fetch_s / token_s)), _TOKENS)
        cost = replace(cost, copy_share=copy_share(experts, slots, transfers, comm, num_tokens, cost.fetch_s))
    if comm.world_size > 1:
        cost = replace(cost, idle_speedup=idle_speedup(comm))
        dtype = next(iter(experts.weights.values())).dtype
        rows = torch.zeros(_TOKENS * comm.world_size, experts.hidden_size, dtype=dtype, device=comm.device)
        row_s = all_to_all_s(rows, comm) / (_TOKENS * (comm.world_size - 1))
        cost = replace(
            cost,
            exchange_token_s=row_s,
            peer_fetch_s=row_s * experts.expert_bytes / rows[0].nbytes,
            relays=comm.exchange == Exchange.PUT,
        )
    return mean_cost(cost, comm)


def mean_cost(cost: ExpertCost, comm: Communicator) -> ExpertCost:
    """Return the mean over ranks of what each measured, the same on every rank; all call it together."""
    everyone = [own.numbers() for own in comm.gather_objects(cost)]
    means: dict[str, Any] = {name: float(np.mean([numbers[name] for numbers in everyone])) for name in _MEASURED}
    return replace(cost, **means)


def with_host_cost(
    cost: ExpertCost, experts: LayerExperts, comm: Communicator, transfers: Transfers, host: Host
) -> ExpertCost:
    """Return the costs with those of the host, and with those of a device that shares its memory, while both compute.

    All ranks measure at once, devices and hosts with the same work at the same time, since they may share memory and
    its bandwidth, as they do in a run: a few slices in a row on either side, of one token, of some and of many. Weights
    are fetched meanwhile.

    Args:
        cost: of a device alone.
        experts: the layer.
        comm: the ranks.
        transfers: what copies experts in the run.
        host: what executes experts beside the device in the run.
    """
    slots = LayerSlots(experts, comm.device).reserve(_slices_in_a_row(experts) + 1)
    for slot in slots:
        transfers.submit(CopyRequest(slot, slot.index, experts.expert(slot.index % experts.num_experts)))
        transfers.wait(slot)
    comm.barrier()
    times = [_together_s(experts, slots, transfers, host, num_tokens) for num_tokens in (1, _FEW_TOKENS, _TOKENS)]
    flat = [*chain.from_iterable(times), _trip_s(experts, comm.device, host)]
    measured = torch.tensor(flat, dtype=torch.float64, device=comm.device)
    if comm.world_size > 1:
        dist.all_reduce(measured)
    *both_s, trip_s = (measured / comm.world_size).tolist()
    host_launch_s, host_weights_s, host_token_s = _parts(*both_s[1::3])
    if not Device.of(comm.device).has_own_memory:
        # The host takes bandwidth from the device then; otherwise so few tokens say nothing of the device's rate.
        launch_s, weights_s, token_s = _parts(*both_s[0::3])
        cost = replace(cost, token_s=token_s, launch_s=launch_s, weights_s=weights_s)
    return replace(
        cost,
        fetch_s=max(cost.fetch_s, both_s[-1]),
        host_token_s=host_token_s,
        host_launch_s=host_launch_s,
        host_weights_s=host_weights_s,
        host_trip_s=trip_s,
    )


def _parts(one_s: float, few_s: float, many_s: float) -> tuple[float, float, float]:
    """Return a slice's launch, the time to read its weights, and the time of a token, in seconds.

    Args:
        one_s: time of a slice of one token, which is the launch and the weights.
        few_s: of a few tokens.
        many_s: of many.
    """
    slope_s = max(many_s - few_s, 0.0) / (_TOKENS - _FEW_TOKENS)
    launch_s = min(max(0.0, few_s - _FEW_TOKENS * slope_s), one_s)
    return launch_s, one_s - launch_s, max(many_s - launch_s, 0.0) / _TOKENS


def _slices_in_a_row(experts: LayerExperts) -> int:
    """Return how many slices are timed together: of small experts several, which caches cannot all hold."""
    return min(experts.num_experts, max(1, min(_MOST_IN_A_ROW, _SCRATCH_BYTES // experts.expert_bytes)))


def random_rows(experts: LayerExperts, num_tokens: int, device: torch.device) -> Tensor:
    """Return tokens as a layer gets them; whoever starts a session keeps the random numbers that come next."""
    own, sample = torch.Generator().manual_seed(0), next(iter(experts.weights.values()))
    return torch.randn(num_tokens, experts.hidden_size, generator=own).to(device=device, dtype=sample.dtype)


def _together_s(
    experts: LayerExperts, slots: Sequence[Slot], transfers: Transfers, host: Host, num_tokens: int
) -> tuple[float, float, float]:
    """Return the median times in seconds of a slice on the device, of one on the host, and of a fetch meanwhile.

    Args:
        experts: the layer.
        slots: hold some of them, which the device executes one after the other; the last is for fetches.
        transfers: what fetches.
        host: executes as many others at the same time.
        num_tokens: of every slice.
    """
    *slots, fetched = slots
    device, many = fetched.layer.device, len(slots)
    rows = random_rows(experts, num_tokens * many, device)
    out, clear, found = torch.empty_like(rows), cold_caches(device), []
    parts = [slice(i * num_tokens, (i + 1) * num_tokens) for i in range(many)]
    for call in range(_REPEATS + 1):
        clear()
        Device.of(device).synchronize()
        others = [experts.num_experts - 1 - (call * many + i) % experts.num_experts for i in range(many)]
        on_host = [HostSlice(expert_id, i * num_tokens, num_tokens) for i, expert_id in enumerate(others)]
        copy = transfers.submit(CopyRequest(fetched, call, experts.expert(call % experts.num_experts)))
        host.start(experts, on_host, rows, torch.empty_like(rows))
        begin = time.perf_counter()
        for slot, part in zip(slots, parts, strict=True):
            experts.function(slot.weights, rows[part], out[part])
        Device.of(device).synchronize_compute()
        device_s = (time.perf_counter() - begin) / many
        host_s = span_s(host.finish().busy[0]) / many
        transfers.wait(fetched)
        transfers.drain()
        Device.of(device).synchronize()
        assert copy.span is not None
        found.append((device_s, host_s, span_s(copy.span)))
    device_s, host_s, copied_s = (median(times) for times in zip(*found[1:], strict=True))
    return device_s, host_s, copied_s


def _trip_s(experts: LayerExperts, device: torch.device, host: Host) -> float:
    """Return the median time in seconds that the host has a row beside what it computes with it."""
    row, found = random_rows(experts, 1, device), []
    for call in range(_REPEATS + 1):
        out = torch.empty_like(row)
        Device.of(device).synchronize()
        begin = time.perf_counter()
        host.start(experts, [HostSlice(call % experts.num_experts, 0, 1)], row, out)
        busy_s = span_s(host.finish().busy[0])
        Device.of(device).synchronize()
        found.append(max(0.0, time.perf_counter() - begin - busy_s))
    return median(found[1:])


def fit_expert(slice_s: Callable[[int], float]) -> tuple[float, float]:
    """Return what a slice of an expert costs whatever its tokens, and what each of them costs, in seconds.

    Args:
        slice_s: measures a slice of so many tokens, in seconds.
    """
    few, many = _FEW_TOKENS, _TOKENS
    one_s, few_s, many_s = slice_s(1), slice_s(few), slice_s(many)
    while many_s < _TIMES_AS_LONG * few_s and many < _MOST_TOKENS:
        # A GPU takes as long for a few hundred tokens as for one: weights are read, and kernels launched.
        many *= 4
        many_s = slice_s(many)
    if many_s <= few_s:
        return 0.0, many_s / many
    token_s = (many_s - few_s) / (many - few)
    # No launch takes longer than a slice of one token, whatever noise says.
    return min(max(0.0, few_s - few * token_s), one_s), token_s


def expert_s(experts: LayerExperts, slot: Slot, transfers: Transfers, num_tokens: int) -> float:
    """Return the median time of one expert's computation on ``num_tokens`` rows, in seconds.

    Caches are cold, as they are for an expert whose turn comes after all others had theirs.
    """
    compute = _computation(experts, slot, transfers, num_tokens)
    return median_s(compute, slot.layer.device, before=cold_caches(slot.layer.device))


def cold_caches(device: torch.device) -> Callable[[], object]:
    """Return what takes everything out of the device's caches."""
    scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    return scratch.zero_


def fetch_s(experts: LayerExperts, slot: Slot, transfers: Transfers) -> float:
    """Return the median time of copying one expert into a slot, in seconds."""
    samples = []
    for i in range(_REPEATS + 1):
        # Another expert every time: the one just copied may still be in a cache.
        copy = transfers.submit(CopyRequest(slot, i, experts.expert(i % experts.num_experts)))
        transfers.wait(slot)
        transfers.drain()
        assert copy.span is not None
        samples.append(span_s(copy.span))
    return median(samples[1:])


def fetch_together_s(
    experts: LayerExperts, slot: Slot, transfers: Transfers, comm: Communicator, alone_s: float
) -> float:
    """Return how long copying one expert into a slot takes while all ranks do so; all ranks together.

    From the beginning of one copy to that of the next, since a link may serve ranks in turns: then each copy is as fast
    as alone, and a rank stands still between two of its own. On average, as turns may last for several copies.

    Args:
        experts: the layer.
        slot: a slot of it.
        transfers: what copies.
        comm: the ranks.
        alone_s: how long one copy takes otherwise: so many are made that ranks are busy for longer than they may
            start apart.
    """
    number = min(max(2 * _REPEATS, math.ceil(_TOGETHER_S / max(alone_s, 1e-9))), _MOST_TOGETHER)
    comm.barrier()
    requests = (CopyRequest(slot, i, experts.expert(i % experts.num_experts)) for i in range(number))
    copies = [transfers.submit(request) for request in requests]
    transfers.wait(slot)
    transfers.drain()
    # Neither the first nor the last, since others may not have begun, or be through.
    begins = [copy.span[0] for copy in copies[number // 4 : -(number // 4)] if copy.span is not None]
    return span_s((begins[0], begins[-1])) / (len(begins) - 1)


def copy_share(
    experts: LayerExperts,
    slots: Sequence[Slot],
    transfers: Transfers,
    comm: Communicator,
    num_tokens: int,
    copy_s: float,
) -> float:
    """Return the share of copies' time by which they delay what is computed beside them; all ranks together.

    Args:
        experts: the layer.
        slots: the first computes, and experts are copied into the others.
        transfers: what copies.
        comm: the ranks.
        num_tokens: of the slice that is computed, which should take longer than the copies.
        copy_s: how long one copy takes otherwise.
    """
    alone_s, beside_s = (beside_copies_s(experts, s, transfers, num_tokens, comm.barrier) for s in (slots[:1], slots))
    return min(max(0.0, beside_s - alone_s) / ((len(slots) - 1) * copy_s), 1.0)


def beside_copies_s(
    experts: LayerExperts,
    slots: Sequence[Slot],
    transfers: Transfers,
    num_tokens: int,
    before: Callable[[], object],
) -> float:
    """Return the median time of one expert's computation while others are copied, in seconds.

    Args:
        experts: the layer.
        slots: the first computes, and experts are copied into the others.
        transfers: what copies.
        num_tokens: of the slice that is computed.
        before: called before every time, untimed, when nothing is copied.
    """
    computes, *copied = slots
    compute = _computation(experts, computes, transfers, num_tokens)

    def prepare() -> None:
        transfers.drain()
        before()

    def compute_beside(call: int) -> None:
        for i, slot in enumerate(copied):
            expert_id = (call * len(copied) + i) % experts.num_experts
            transfers.submit(CopyRequest(slot, expert_id, experts.expert(expert_id)))
        compute(call)

    seconds = median_s(compute_beside, computes.layer.device, before=prepare)
    transfers.drain()
    return seconds


def idle_speedup(comm: Communicator) -> float:
    """Return how many times as fast a rank computes while all others are idle; all ranks together.

    Not measured, since other programs would be measured, too: ranks on processors share what these have, a core per
    thread. Those on devices of their own share nothing.
    """
    if Device.of(comm.device).has_own_memory:
        return 1.0
    host, own_threads = gethostname(), torch.get_num_threads()
    num_threads = sum(n for of, n in comm.gather_objects((host, own_threads)) if of == host)
    return max(1.0, num_threads / max(usable_cores().number, own_threads))


def _computation(experts: LayerExperts, slot: Slot, transfers: Transfers, num_tokens: int) -> Callable[[int], object]:
    """Return what computes a slice of so many tokens of an expert in a slot."""
    transfers.submit(CopyRequest(slot, 0, experts.expert(0)))
    transfers.wait(slot)
    rows = random_rows(experts, num_tokens, slot.layer.device)
    out = torch.empty_like(rows)
    return lambda _: experts.function(slot.weights, rows, out)


def median_s(
    action: Callable[[int], object], device: torch.device, *, before: Callable[[], object] = lambda: None
) -> float:
    """Return the median time of an action that gets the number of its call, in seconds.

    Args:
        action: called once more than it counts, to warm up.
        device: waited for after every call.
        before: called before every call, untimed.
    """
    samples = []
    for i in range(_REPEATS + 1):
        before()
        Device.of(device).synchronize()
        start = time.perf_counter()
        action(i)
        Device.of(device).synchronize()
        samples.append(time.perf_counter() - start)
    return median(samples[1:])


def all_to_all_s(rows: Tensor, comm: Communicator) -> float:
    """Return the median time in which every rank sends all ranks equal shares of ``rows``, in seconds."""
    num_ranks = comm.world_size
    per_rank = len(rows) // num_ranks
    # As many experts as ranks, each on its own.
    tokens_WEW = np.broadcast_to(np.eye(num_ranks, dtype=np.int64) * per_rank, (num_ranks,) * 3)
    expert_ids_T1 = torch.arange(num_ranks, device=comm.device).repeat_interleave(per_rank)[:, None]
    assignments = Assignments(expert_ids_T1, np.full(num_ranks, per_rank))
    given = (rows[: len(expert_ids_T1)], assignments, tokens_WEW)
    return median_s(lambda _: comm.send_rows(*given), comm.device, before=comm.barrier)
