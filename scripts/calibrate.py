"""Measure what HarMoEny's threshold and the simulator need of this machine, and write conf/hardware/<name>.yaml.

It measures, on all ranks at once and with cold caches: an expert's computation against its number of tokens, the link
from host to device memory against the size of a transfer, what copied weights take from computation beside them, copies
of rows in device memory, the all-to-all against its size, and a MoE layer of this runtime whose experts compute next to
nothing. Times that grow with a size are fitted as a fixed time plus a rate. No system's run on any routing with skew is
among them. Afterwards `python run.py hardware=<name> ...` uses these numbers in place of a measurement at the start of
every run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from torch import Tensor

from baselines.static_ep import StaticEP
from experiments.cores import usable_cores
from experiments.launch.calls import call_on_ranks
from experiments.routers.base import RoutingRequest
from experiments.routers.uniform import UniformRouter
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.models.base import DTYPES
from harmoeny.models.moe_stack import MoEStack
from harmoeny.runtime.calibrate import all_to_all_s, cold_caches, expert_s, fetch_s, median_s
from harmoeny.runtime.device import Device, best_device_type
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.slots import Slot
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers
from harmoeny.runtime.start import start_rank
from results_schema.atomic import atomic_path
from results_schema.printing import print_anything

_TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048)
#: Shares of the expert's size for which the host link is measured.
_WIDTH_SHARES = (1 / 16, 1 / 4, 1)
_ROWS = (1, 64, 512, 2048)
_LAYER_TOKENS = 1024
_NUM_EXPERTS = 8
#: What follows each other in one timing of copies, since the first operator after the caches were emptied takes longer.
_NUM_COPIES = 8
#: Loads beside a computation of so many tokens.
_NUM_LOADS, _BESIDE_TOKENS = _NUM_EXPERTS - 1, 256
#: For static EP, which asks nothing of it.
_UNUSED_COST = ExpertCost(token_s=1e-9, fetch_s=1.0)
#: Width of the experts in the layer that computes next to nothing.
_NARROW = 8

#: (size, seconds): tokens, bytes to the device, bytes copied, bytes sent to other ranks.
Samples = list[tuple[float, float]]


def measure(
    device: torch.device, hidden_size: int, intermediate_size: int, dtype: str, rounds: int
) -> dict[str, Samples]:
    """Measure as one of the ranks; every round measures everything once, and medians over the rounds count."""
    comm = Communicator(device)
    widths = [max(1, int(intermediate_size * share)) for share in _WIDTH_SHARES]
    layers = [_experts(hidden_size, width, dtype) for width in widths]
    engine = start_rank(layers, comm, cost=_UNUSED_COST)
    transfers = engine.memory.transfers
    slots = [engine.memory.pool.reserve(layer, 1)[0] for layer in range(len(layers))]
    sent = [torch.zeros(rows * comm.world_size, hidden_size, dtype=DTYPES[dtype], device=device) for rows in _ROWS]
    remote_share = (comm.world_size - 1) / comm.world_size
    narrow = start_rank([_experts(_NARROW, _NARROW, "float32")], comm, cost=_UNUSED_COST)
    narrow_layer = _narrow_layer(narrow)
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for experts, slot in zip(layers, slots, strict=True):
            comm.barrier()
            found["host_link", experts.expert_bytes].append(fetch_s(experts, slot, transfers))
        for num_tokens in _TOKENS:
            comm.barrier()
            found["expert", num_tokens].append(expert_s(layers[-1], slots[-1], transfers, num_tokens))
        comm.barrier()
        found["beside_loads", _NUM_LOADS].append(beside_loads_s(layers[-1], device, transfers))
        for rows in sent:
            comm.barrier()
            found["copy", 2 * rows.nbytes].append(copy_s(rows))
            if comm.world_size > 1:
                found["all_to_all", rows.nbytes * remote_share].append(all_to_all_s(rows, comm))
        found["layer", _LAYER_TOKENS].append(narrow_layer())
    narrow.close()
    engine.close()
    samples: dict[str, Samples] = defaultdict(list)
    for (key, size), seconds in found.items():
        samples[key].append((size, median(seconds)))
    return dict(samples)


def copy_s(rows: Tensor) -> float:
    """Return the median time in which rows are brought into another order, in seconds."""
    order = torch.randperm(len(rows)).to(rows.device)
    sources = [rows.clone() for _ in range(_NUM_COPIES)]

    def copy_all(_: int) -> None:
        for source in sources:
            source.index_select(0, order)

    return median_s(copy_all, rows.device, before=cold_caches(rows.device)) / _NUM_COPIES


def beside_loads_s(experts: LayerExperts, device: torch.device, transfers: Transfers) -> float:
    """Return the median time of one expert's computation while others are copied, in seconds."""
    slots = [Slot(experts, device) for _ in range(1 + _NUM_LOADS)]
    computing, *copied = slots
    transfers.submit(CopyRequest(computing, 0, experts.expert(0)))
    transfers.wait(computing)
    sample = next(iter(experts.weights.values()))
    rows = torch.randn(_BESIDE_TOKENS, experts.hidden_size).to(device=device, dtype=sample.dtype)
    out = torch.empty_like(rows)
    empty_caches = cold_caches(device)

    def prepare() -> None:
        transfers.drain()
        empty_caches()

    def compute(_: int) -> None:
        for i, slot in enumerate(copied):
            transfers.submit(CopyRequest(slot, i + 1, experts.expert(i + 1)))
        experts.function(computing.weights, rows, out)

    seconds = median_s(compute, device, before=prepare)
    transfers.drain()
    return seconds


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
        num_tokens=_LAYER_TOKENS, num_experts=_NUM_EXPERTS, top_k=1, batch=0, layer=0, rank=comm.rank, seed=0,
        world_size=comm.world_size,
    )  # fmt: skip
    expert_ids = torch.from_numpy(UniformRouter().assign(request)).to(comm.device)
    weights = torch.ones(_LAYER_TOKENS, 1, device=comm.device)
    return lambda: median_s(lambda _: engine.forward(0, hidden, expert_ids, weights), comm.device, before=prepare)


def _experts(hidden_size: int, intermediate_size: int, dtype: str) -> LayerExperts:
    config = MoEStack(
        num_experts=_NUM_EXPERTS, hidden_size=hidden_size, intermediate_size=intermediate_size, dtype=dtype,
        vocab_size=1,
    )  # fmt: skip
    return config.build(0).experts[0]


def fit(samples: Samples) -> tuple[float, float]:
    """Fit ``time = fixed + size / rate`` with both terms at least 0, by least squares of the relative error.

    Returns:
        The fixed time in seconds and the rate per second.

    Raises:
        ValueError: the time does not grow with the size, so that there is no rate.
    """
    size, seconds = np.asarray(samples, dtype=np.float64).T
    (fixed, slope), _ = nnls(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(seconds)))
    if slope <= 0:
        raise ValueError("the measured times do not grow with the size: the machine is too busy, try again")
    return float(fixed), float(1 / slope)


def calibrate(
    name: str, world_size: int, device_type: str, hidden_size: int, intermediate_size: int, dtype: str, rounds: int = 5
) -> tuple[Hardware, dict[str, Samples]]:
    """Measure on new ranks and fit; a sample is the mean over ranks.

    Returns:
        The description, and the samples that it was fitted to.

    Raises:
        ValueError: what was measured does not grow with its size.
    """
    by_rank = call_on_ranks(world_size, device_type, measure, hidden_size, intermediate_size, dtype, rounds)
    samples = {
        key: [
            (points[0][0], float(np.mean([seconds for _, seconds in points])))
            for points in zip(*(rank[key] for rank in by_rank), strict=True)
        ]
        for key in by_rank[0]
    }
    flops_per_token = 2 * 2 * hidden_size * intermediate_size
    fits: dict[str, tuple[float, float]] = {}
    for key in ("expert", "host_link", "copy", "all_to_all"):
        if key in samples:
            try:
                fits[key] = fit(samples[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    (launch_s, tokens_per_s), (latency_s, link_rate), (operator_s, copy_rate) = (
        fits[key] for key in ("expert", "host_link", "copy")
    )
    exchange_s, exchange_rate = fits.get("all_to_all", (0.0, None))
    [(num_loads, beside_s)], [(_, layer_s)] = samples["beside_loads"], samples["layer"]
    loads_s = num_loads * samples["host_link"][-1][1]
    slowed_s = beside_s - dict(samples["expert"])[_BESIDE_TOKENS]
    hardware = Hardware(
        name=name,
        host_link_bytes_per_s=_round(link_rate),
        host_link_latency_s=_round(latency_s),
        host_link_processor_share=_round(float(np.clip(slowed_s / loads_s, 0, 1))),
        expert_flops_per_s=_round(tokens_per_s * flops_per_token),
        expert_launch_s=_round(launch_s),
        device_memory_bytes_per_s=_round(copy_rate),
        operator_s=_round(operator_s),
        all_to_all_bytes_per_s=None if exchange_rate is None else _round(exchange_rate),
        all_to_all_latency_s=_round(exchange_s),
        # Its exchanges, of counts and of rows both ways, have a term of their own.
        runtime_layer_s=_round(max(0.0, layer_s - 3 * exchange_s)),
    )
    return hardware, samples


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def write(hardware: Hardware, path: Path, comment: str) -> None:
    """Write the description as a choice of the Hydra group ``hardware``."""
    fields = {k: v for k, v in asdict(hardware).items() if v != getattr(Hardware(), k)}
    with atomic_path(path) as temporary:
        temporary.write_text(
            "".join(f"# {line}\n" for line in comment.splitlines())
            + yaml.safe_dump({"defaults": ["measured"], **fields}, sort_keys=False),
            encoding="utf-8",
        )


def _report(hardware: Hardware, samples: dict[str, Samples], expert_bytes: int, flops_per_token: int) -> None:
    table = Table(title=f"hardware={hardware.name}")
    for column in ("what", "size", "measured", "fitted"):
        table.add_column(column, justify="right" if column != "what" else "left")
    expert_rate, copy_rate = hardware.expert_flops_per_s or 1, hardware.device_memory_bytes_per_s or 1

    def expert_s(num_tokens: float) -> float:
        return hardware.expert_launch_s + num_tokens * flops_per_token / expert_rate

    def exchange_s(num_bytes: float) -> float:
        return hardware.all_to_all_latency_s + num_bytes / (hardware.all_to_all_bytes_per_s or 1)

    fits: dict[str, tuple[str, Callable[[float], float]]] = {
        "expert": ("tokens", expert_s),
        "host_link": ("bytes", hardware.host_link_s),
        "beside_loads": (
            "loads",
            lambda n: (
                expert_s(_BESIDE_TOKENS) + n * hardware.host_link_processor_share * hardware.host_link_s(expert_bytes)
            ),
        ),
        "copy": ("bytes", lambda n: hardware.operator_s + n / copy_rate),
        "all_to_all": ("bytes", exchange_s),
        "layer": ("tokens", lambda _: hardware.runtime_layer_s + 3 * exchange_s(0)),
    }
    for key, points in samples.items():
        for size, seconds in points:
            unit, fitted_s = fits[key]
            table.add_row(key, f"{size:,.0f} {unit}", f"{seconds * 1e3:.3f} ms", f"{fitted_s(size) * 1e3:.3f} ms")
    console = Console()
    console.print(table)
    cost = hardware.expert_cost(expert_bytes=expert_bytes, flops_per_token=flops_per_token)
    assert cost is not None
    console.print(
        f"One fetch takes {cost.fetch_s * 1e3:.2f} ms, one token {cost.token_s * 1e6:.1f} us: "
        f"HarMoEny's threshold for this expert is {cost.threshold_tokens()} tokens.",
        soft_wrap=True,
    )


def main() -> None:
    """Calibrate."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.calibrate", description=__doc__)
    parser.add_argument("--name", default="this_machine", help="of the file and of the choice (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=2, help="ranks that measure at once (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=768, help="of the expert (default: %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=3072, help="of the expert (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="the median over them counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("conf/hardware"), help="folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9_]+", arguments.name) or arguments.name == "measured":
        parser.error(f"--name: {arguments.name!r}, must be letters, digits and _, and not 'measured'")
    for option in ("world_size", "hidden_size", "intermediate_size", "rounds"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: {getattr(arguments, option)}, must be at least 1")
    path: Path = arguments.out / f"{arguments.name}.yaml"
    if path.exists() and not arguments.force:
        parser.error(f"{path} exists already: choose another --name, or --force")
    device_type = best_device_type()
    if device_type == "cuda" and arguments.world_size > torch.cuda.device_count():
        parser.error(f"--world-size: {arguments.world_size}, must be at most {torch.cuda.device_count()} CUDA devices")
    try:
        hardware, samples = calibrate(
            arguments.name, arguments.world_size, device_type, arguments.hidden_size, arguments.intermediate_size,
            arguments.dtype, arguments.rounds,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    threads = max(1, usable_cores().number // arguments.world_size)
    write(
        hardware,
        path,
        f"Measured by scripts/calibrate.py on {datetime.now(UTC):%Y-%m-%d}, {arguments.world_size} ranks at once:\n"
        f"{Device.of(torch.device(device_type)).name}, {threads} threads per rank, PyTorch {torch.__version__},\n"
        f"expert {arguments.hidden_size}/{arguments.intermediate_size}, {arguments.dtype}.",
    )
    matrices = 2 * arguments.hidden_size * arguments.intermediate_size
    _report(hardware, samples, matrices * DTYPES[arguments.dtype].itemsize, 2 * matrices)
    print(f"written: {path}; use it as: python run.py hardware={arguments.name} ...")


if __name__ == "__main__":
    main()
