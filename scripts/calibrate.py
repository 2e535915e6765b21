"""Measure what HarMoEny's threshold and the simulator need of this machine, and write conf/hardware/<name>.yaml.

It measures, on all ranks at once: an expert's computation against its number of tokens, the link from host to device
memory against the size of a transfer, and the all-to-all against its size; each is fitted as a fixed time plus a rate.
Afterwards `python run.py hardware=<name> ...` uses these numbers in place of a measurement at the start of every run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from experiments.cache import atomic_path
from experiments.launch.calls import call_on_ranks
from experiments.manifest import device_name
from harmoeny.hardware import Hardware
from harmoeny.models.base import DTYPES
from harmoeny.models.moe_stack import MoEStack
from harmoeny.runtime.calibrate import all_to_all_s, expert_s, fetch_s
from harmoeny.runtime.comm import Communicator
from harmoeny.runtime.experts import ExpertStore, LayerExperts
from harmoeny.runtime.slots import Slot
from harmoeny.runtime.transfer import make_engine

_TOKENS = (1, 8, 32, 128, 512, 1024, 2048)
#: Shares of the expert's size for which the host link is measured.
_WIDTH_SHARES = (1 / 16, 1 / 4, 1)
_ROWS = (1, 64, 512, 2048)
_NUM_EXPERTS = 8

#: (size, seconds): tokens, bytes to the device, bytes sent to other ranks.
Samples = list[tuple[float, float]]


def measure(device: torch.device, hidden_size: int, intermediate_size: int, dtype: str) -> dict[str, Samples]:
    """Measure as one of the ranks."""
    comm = Communicator(device)
    engine = make_engine(device, Hardware())
    samples: dict[str, Samples] = {"expert": [], "host_link": [], "all_to_all": []}
    for share in _WIDTH_SHARES:
        experts = _experts(hidden_size, max(1, int(intermediate_size * share)), dtype, pin=device.type == "cuda")
        slot = Slot(experts, device)
        comm.barrier()
        samples["host_link"].append((experts.expert_bytes, fetch_s(experts, slot, engine)))
    for num_tokens in _TOKENS:
        comm.barrier()
        samples["expert"].append((num_tokens, expert_s(experts, slot, engine, num_tokens)))
    if comm.world_size > 1:
        for rows in _ROWS:
            sent = torch.zeros(rows * comm.world_size, hidden_size, dtype=DTYPES[dtype], device=device)
            others = sent.nbytes * (comm.world_size - 1) / comm.world_size
            samples["all_to_all"].append((others, all_to_all_s(sent, comm)))
    engine.close()
    return samples


def _experts(hidden_size: int, intermediate_size: int, dtype: str, *, pin: bool) -> LayerExperts:
    config = MoEStack(
        num_experts=_NUM_EXPERTS, hidden_size=hidden_size, intermediate_size=intermediate_size, dtype=dtype,
        vocab_size=1,
    )  # fmt: skip
    return ExpertStore(config.build(0).experts, pin=pin).layers[0]


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
    name: str, world_size: int, device_type: str, hidden_size: int, intermediate_size: int, dtype: str
) -> tuple[Hardware, dict[str, Samples]]:
    """Measure on new ranks and fit; a sample is the mean over ranks.

    Returns:
        The description, and the samples that it was fitted to.
    """
    by_rank = call_on_ranks(world_size, device_type, measure, hidden_size, intermediate_size, dtype)
    samples = {
        key: [
            (points[0][0], float(np.mean([seconds for _, seconds in points])))
            for points in zip(*(rank[key] for rank in by_rank), strict=True)
        ]
        for key in by_rank[0]
    }
    flops_per_token = 2 * 2 * hidden_size * intermediate_size
    launch_s, tokens_per_s = fit(samples["expert"])
    latency_s, link_rate = fit(samples["host_link"])
    exchange_s, exchange_rate = fit(samples["all_to_all"]) if samples["all_to_all"] else (0.0, None)
    hardware = Hardware(
        name=name,
        host_link_bytes_per_s=_round(link_rate),
        host_link_latency_s=_round(latency_s),
        expert_flops_per_s=_round(tokens_per_s * flops_per_token),
        expert_launch_s=_round(launch_s),
        all_to_all_bytes_per_s=None if exchange_rate is None else _round(exchange_rate),
        all_to_all_latency_s=_round(exchange_s),
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
    fits: dict[str, Callable[[float], float]] = {
        "expert": lambda n: hardware.expert_launch_s + n * flops_per_token / (hardware.expert_flops_per_s or 1),
        "host_link": hardware.host_link_s,
        "all_to_all": lambda n: hardware.all_to_all_latency_s + n / (hardware.all_to_all_bytes_per_s or 1),
    }
    units = {"expert": "tokens", "host_link": "bytes", "all_to_all": "bytes"}
    for key, points in samples.items():
        for size, seconds in points:
            table.add_row(
                key, f"{size:,.0f} {units[key]}", f"{seconds * 1e3:.3f} ms", f"{fits[key](size) * 1e3:.3f} ms"
            )
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
    parser = argparse.ArgumentParser(prog="python -m scripts.calibrate", description=__doc__)
    parser.add_argument("--name", default="this_machine", help="of the file and of the choice (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=2, help="ranks that measure at once (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=768, help="of the expert (default: %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=3072, help="of the expert (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("conf/hardware"), help="folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9_]+", arguments.name) or arguments.name == "measured":
        parser.error(f"--name: {arguments.name!r}, must be letters, digits and _, and not 'measured'")
    for option in ("world_size", "hidden_size", "intermediate_size"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: {getattr(arguments, option)}, must be at least 1")
    path: Path = arguments.out / f"{arguments.name}.yaml"
    if path.exists() and not arguments.force:
        parser.error(f"{path} exists already: choose another --name, or --force")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and arguments.world_size > torch.cuda.device_count():
        parser.error(f"--world-size: {arguments.world_size}, must be at most {torch.cuda.device_count()} CUDA devices")
    try:
        hardware, samples = calibrate(
            arguments.name, arguments.world_size, device_type, arguments.hidden_size, arguments.intermediate_size,
            arguments.dtype,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.world_size)
    write(
        hardware,
        path,
        f"Measured by scripts/calibrate.py on {datetime.now(UTC):%Y-%m-%d}, {arguments.world_size} ranks at once:\n"
        f"{device_name(torch.device(device_type))}, {threads} threads per rank, PyTorch {torch.__version__},\n"
        f"expert {arguments.hidden_size}/{arguments.intermediate_size}, {arguments.dtype}.",
    )
    matrices = 2 * arguments.hidden_size * arguments.intermediate_size
    _report(hardware, samples, matrices * DTYPES[arguments.dtype].itemsize, 2 * matrices)
    print(f"written: {path}; use it as: python run.py hardware={arguments.name} ...")


if __name__ == "__main__":
    main()
