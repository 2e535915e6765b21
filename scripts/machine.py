"""What scripts/calibrate.py fits a machine's description to: times of this runtime's parts, measured on ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from baselines.static_ep import StaticEP
from experiments.routers.base import RoutingRequest
from experiments.routers.uniform import UniformRouter
from harmoeny.choices import KernelName
from harmoeny.cost import ExpertCost
from harmoeny.models.base import DTYPES
from harmoeny.models.moe_stack import MoEStack
from harmoeny.runtime.calibrate import all_to_all_s, beside_copies_s, cold_caches, expert_s, fetch_s, median_s
from harmoeny.runtime.calibrate_device import EARLY_ROWS, measure_early
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.kernels.base import Kernel, Results
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.slots import LayerSlots
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers
from harmoeny.runtime.memory.waves import Schedule
from harmoeny.runtime.start import start_rank

_TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048)
#: Shares of the expert's size for which the host link is measured.
_WIDTH_SHARES = (1 / 16, 1 / 4, 1)
_ROWS = (1, 64, 512, 2048)
_LAYER_TOKENS = 1024
NUM_EXPERTS = 8
#: What follows each other in one timing of copies, since the first operator after the caches were emptied takes longer.
_NUM_COPIES = 8
#: Copies of experts beside a computation of so many tokens.
_NUM_BESIDE, BESIDE_TOKENS = NUM_EXPERTS - 1, 256
#: For static EP, which asks nothing of it.
_UNUSED_COST = ExpertCost(token_s=1e-9, fetch_s=1.0)
#: Width of the experts in the layer that computes next to nothing.
_NARROW = 8

#: Times of the same computation by which ranks are compared, per round.
_NUM_BUSY = 40
#: (size, seconds): tokens, bytes to the device, bytes copied, bytes sent to other ranks.
Samples = list[tuple[float, float]]


@dataclass(frozen=True)
class Expert:
    """The expert that is measured, of two matrices.

    Attributes:
        hidden_size: width of a token.
        intermediate_size: width between the matrices.
        dtype: of the weights, ``float32`` or ``bfloat16``.
    """

    hidden_size: int
    intermediate_size: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of its weights."""
        return 2 * self.hidden_size * self.intermediate_size * DTYPES[self.dtype].itemsize

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token."""
        return 2 * 2 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Measured:
    """What one rank measured.

    Attributes:
        samples: by what was measured; with a grouped kernel, those of ``expert`` are of waves of ``NUM_EXPERTS``.
        kernel: what computed the experts.
        busy_s: per round, times of one and the same computation.
    """

    samples: dict[str, Samples]
    kernel: str
    busy_s: list[list[float]]


def measure(device: torch.device, expert: Expert, rounds: int, kernel_name: str = KernelName.AUTO) -> Measured:
    """Measure as one of the ranks; every round measures everything once, and medians over the rounds count."""
    comm, hidden_size = Communicator(device), expert.hidden_size
    widths = [max(1, int(expert.intermediate_size * share)) for share in _WIDTH_SHARES]
    layers = [_layer_of(Expert(hidden_size, width, expert.dtype)) for width in widths]
    engine = start_rank(layers, comm, cost=_UNUSED_COST)
    transfers = engine.memory.transfers
    slots = [layer.reserve(1)[0] for layer in engine.memory.pool.layers]
    kernel = _filled_kernel(kernel_name, layers[-1], transfers, device)
    dtype = DTYPES[expert.dtype]
    sent = [torch.zeros(rows * comm.world_size, hidden_size, dtype=dtype, device=device) for rows in _ROWS]
    remote_share = (comm.world_size - 1) / comm.world_size
    narrow = start_rank([_layer_of(Expert(_NARROW, _NARROW, "float32"))], comm, cost=_UNUSED_COST)
    narrow_layer = _narrow_layer(narrow)
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    busy_s = []
    for _ in range(rounds):
        for experts, slot in zip(layers, slots, strict=True):
            comm.barrier()
            found["host_link", experts.expert_bytes].append(fetch_s(experts, slot, transfers))
        for num_tokens in _TOKENS:
            comm.barrier()
            if kernel.grouped:
                found["expert", num_tokens * NUM_EXPERTS].append(wave_s(kernel, num_tokens))
            else:
                found["expert", num_tokens].append(expert_s(layers[-1], slots[-1], transfers, num_tokens))
        comm.barrier()
        found["beside_copies", _NUM_BESIDE].append(_beside_copies_s(layers[-1], device, transfers))
        for rows in sent:
            comm.barrier()
            found["copy", 2 * rows.nbytes].append(copy_s(rows))
            if comm.world_size > 1:
                found["all_to_all", rows.nbytes * remote_share].append(all_to_all_s(rows, comm))
        found["layer", _LAYER_TOKENS].append(narrow_layer())
        if isinstance(kernel, GroupedKernel) and comm.world_size > 1:
            found["early", EARLY_ROWS].append(measure_early(kernel, comm))
        comm.barrier()
        busy_s.append(_busy_s(kernel))
    narrow.close()
    engine.close()
    samples: dict[str, Samples] = defaultdict(list)
    for (key, size), seconds in found.items():
        samples[key].append((size, median(seconds)))
    return Measured(dict(samples), str(kernel.name), busy_s)


def _filled_kernel(name: str, experts: LayerExperts, transfers: Transfers, device: torch.device) -> Kernel:
    """Return a kernel over slots that hold all experts of a layer."""
    slots = LayerSlots(experts, device)
    for slot in slots.reserve(NUM_EXPERTS):
        transfers.submit(CopyRequest(slot, slot.index, experts.expert(slot.index)))
    transfers.drain()
    for slot in slots.slots:
        transfers.wait(slot)
    return make_kernel(name, slots, filled=transfers.fills_slots)


def _wave(kernel: Kernel, num_tokens: int) -> Callable[[], None]:
    """Return what computes all experts, each on so many rows: one wave, or one per expert."""
    slots = kernel.slots
    each = list(range(NUM_EXPERTS))
    schedule = Schedule(
        stages=[0] * NUM_EXPERTS, expert_ids=each, slots=each, starts=[i * num_tokens for i in each],
        num_tokens=[num_tokens] * NUM_EXPERTS, ends=[NUM_EXPERTS] if kernel.grouped else [i + 1 for i in each],
    )  # fmt: skip
    dtype = next(iter(slots.experts.weights.values())).dtype
    rows = torch.randn(NUM_EXPERTS * num_tokens, slots.experts.hidden_size).to(device=slots.device, dtype=dtype)
    kernel.begin(schedule)

    def compute() -> None:
        results = Results(rows)
        for wave in schedule.waves():
            kernel(wave, rows, results)

    return compute


def wave_s(kernel: Kernel, num_tokens: int) -> float:
    """Return the median time of a wave of all experts with so many rows each, caches cold, in seconds."""
    compute, device = _wave(kernel, num_tokens), kernel.slots.device
    return median_s(lambda _: compute(), device, before=cold_caches(device))


def _busy_s(kernel: Kernel) -> list[float]:
    """Return times of one and the same computation, seconds: what a layer of a usual size has a rank compute."""
    compute, device = _wave(kernel, _LAYER_TOKENS // NUM_EXPERTS), Device.of(kernel.slots.device)
    compute()
    times = []
    for _ in range(_NUM_BUSY):
        device.synchronize()
        begin_s = time.perf_counter()
        compute()
        device.synchronize()
        times.append(time.perf_counter() - begin_s)
    return times


def copy_s(rows: Tensor) -> float:
    """Return the median time in which rows are brought into another order, in seconds."""
    order = torch.randperm(len(rows)).to(rows.device)
    sources = [rows.clone() for _ in range(_NUM_COPIES)]

    def copy_all(_: int) -> None:
        for source in sources:
            source.index_select(0, order)

    return median_s(copy_all, rows.device, before=cold_caches(rows.device)) / _NUM_COPIES


def _beside_copies_s(experts: LayerExperts, device: torch.device, transfers: Transfers) -> float:
    """Return the median time of one expert's computation while others are copied, with cold caches, in seconds."""
    slots = LayerSlots(experts, device).reserve(1 + _NUM_BESIDE)
    return beside_copies_s(experts, slots, transfers, BESIDE_TOKENS, cold_caches(device))


def _narrow_layer(engine: ExpertParallel) -> Callable[[], float]:
    """Return what gives the median time of a MoE layer of this runtime, in seconds."""
    comm = engine.comm
    engine.use(engine.build_system(StaticEP.name, StaticEP()))
    empty_caches = cold_caches(comm.device)

    def prepare() -> None:
        engine.recorder.begin_iteration()
        empty_caches()
        comm.barrier()
        engine.recorder.begin_layer(0)

    hidden = torch.randn(_LAYER_TOKENS, _NARROW, device=comm.device)
    request = RoutingRequest(
        num_tokens=_LAYER_TOKENS, num_experts=NUM_EXPERTS, top_k=1, batch=0, layer=0, rank=comm.rank, seed=0,
        world_size=comm.world_size,
    )  # fmt: skip
    expert_ids = torch.from_numpy(UniformRouter().assign(request)).to(comm.device)
    weights = torch.ones(_LAYER_TOKENS, 1, device=comm.device)
    return lambda: median_s(lambda _: engine.forward(0, hidden, expert_ids, weights), comm.device, before=prepare)


def _layer_of(expert: Expert) -> LayerExperts:
    config = MoEStack(
        num_experts=NUM_EXPERTS,
        hidden_size=expert.hidden_size,
        intermediate_size=expert.intermediate_size,
        dtype=expert.dtype,
        vocab_size=1,
    )
    return config.build(0).experts[0]
