"""Measure what HarMoEny's threshold and the simulator need of this machine, and write conf/hardware/<name>.yaml.

It measures, on all ranks at once and with cold caches: an expert's computation against its number of tokens, the link
from host to device memory against the size of a transfer, what copied weights take from computation beside them, copies
of rows in device memory, the all-to-all against its size, a MoE layer of this runtime whose experts compute next to
nothing, what executing rows before there is a plan takes beside their products (several ranks with a grouped kernel),
and by how much ranks and rounds differ in one and the same computation. Times that grow with a size are fitted as a
fixed time plus a rate. No system's run on any routing with skew is among them. Afterwards
`python run.py hardware=<name> ...` uses these numbers in place of a measurement at the start of every run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from experiments.launch.calls import call_on_ranks
from experiments.routers.base import FloatArray
from harmoeny.choices import KernelName
from harmoeny.cores import usable_cores
from harmoeny.hardware import Hardware
from harmoeny.models.base import DTYPES
from harmoeny.runtime.device import Device, best_device_type
from results_schema.atomic import write_text
from results_schema.printing import print_anything
from scripts.machine import BESIDE_TOKENS, NUM_EXPERTS, Expert, Samples, measure


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
    name: str, expert: Expert, world_size: int, device_type: str, rounds: int
) -> tuple[Hardware, dict[str, Samples]]:
    """Measure on new ranks and fit; a sample is the mean over ranks.

    Returns:
        The description, and the samples that it was fitted to.

    Raises:
        ValueError: what was measured does not grow with its size.
    """
    by_rank = call_on_ranks(world_size, device_type, measure, expert, rounds)
    samples = {
        key: [
            (points[0][0], float(np.mean([seconds for _, seconds in points])))
            for points in zip(*(rank.samples[key] for rank in by_rank), strict=True)
        ]
        for key in by_rank[0].samples
    }
    hardware = _describe(name, expert, samples, by_rank[0].kernel)
    round_spread, rank_spread = spreads(np.array([rank.busy_s for rank in by_rank]))
    return replace(hardware, round_spread=_round(round_spread), rank_spread=_round(rank_spread)), samples


def spreads(busy_s: FloatArray) -> tuple[float, float]:
    """Return by how much rounds differ, all ranks together, and ranks within a round: spreads of the logarithm.

    Args:
        busy_s: float64 ``[world_size, num_rounds, num_samples]``, times of one and the same computation.
    """
    logs = np.log(busy_s)
    of_rounds = logs.mean(axis=(0, 2))
    rank_variance = float(((logs - of_rounds[:, None]) ** 2).mean())
    if len(of_rounds) < 2:
        return 0.0, rank_variance**0.5
    # Means of a few samples differ by chance, too.
    by_chance = rank_variance / (logs.shape[0] * logs.shape[2])
    return max(0.0, float(of_rounds.var(ddof=1)) - by_chance) ** 0.5, rank_variance**0.5


def _describe(name: str, expert: Expert, samples: dict[str, Samples], kernel: str) -> Hardware:
    """Fit a machine's description to what was measured of it."""
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
    [(num_copies, beside_s)], [(_, layer_s)] = samples["beside_copies"], samples["layer"]
    [(_, early_s)] = samples.get("early", [(0, 0.0)])
    copies_s, slowed_s = num_copies * samples["host_link"][-1][1], 0.0
    if kernel != KernelName.LOOP:  # a wave reads the weights of all its experts, whatever their tokens
        launch_s = max(0.0, launch_s - NUM_EXPERTS * expert.num_bytes / copy_rate)
    else:
        slowed_s = beside_s - dict(samples["expert"])[BESIDE_TOKENS]
    return Hardware(
        name=name,
        host_link_bytes_per_s=_round(link_rate),
        host_link_latency_s=_round(latency_s),
        host_link_processor_share=_round(float(np.clip(slowed_s / copies_s, 0, 1))),
        expert_flops_per_s=_round(tokens_per_s * expert.flops_per_token),
        expert_launch_s=_round(launch_s),
        kernel=kernel,
        device_memory_bytes_per_s=_round(copy_rate),
        operator_s=_round(operator_s),
        all_to_all_bytes_per_s=None if exchange_rate is None else _round(exchange_rate),
        all_to_all_latency_s=_round(exchange_s),
        # Its exchanges, of counts and of rows both ways, have a term of their own.
        runtime_layer_s=_round(max(0.0, layer_s - 3 * exchange_s)),
        early_s=_round(early_s),
    )


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def write(hardware: Hardware, path: Path, comment: str) -> None:
    """Write the description as a choice of the Hydra group ``hardware``."""
    fields = {k: v for k, v in asdict(hardware).items() if v != getattr(Hardware(), k)}
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    write_text(path, head + yaml.safe_dump({"defaults": ["measured"], **fields}, sort_keys=False))


def _report(hardware: Hardware, expert: Expert, samples: dict[str, Samples]) -> None:
    """Print what was measured beside what the description says, and the threshold that follows."""
    table = Table(title=f"hardware={hardware.name}")
    for column in ("what", "size", "measured", "fitted"):
        table.add_column(column, justify="right" if column != "what" else "left")
    expert_rate, copy_rate = hardware.expert_flops_per_s or 1, hardware.device_memory_bytes_per_s or 1

    copy_s = hardware.host_link_s(expert.num_bytes)

    read_s = 0.0 if hardware.kernel == KernelName.LOOP else NUM_EXPERTS * expert.num_bytes / copy_rate

    def expert_s(num_tokens: float) -> float:
        return hardware.expert_launch_s + read_s + num_tokens * expert.flops_per_token / expert_rate

    def exchange_s(num_bytes: float) -> float:
        return hardware.all_to_all_latency_s + num_bytes / (hardware.all_to_all_bytes_per_s or 1)

    fits: dict[str, tuple[str, Callable[[float], float]]] = {
        "expert": ("tokens", expert_s),
        "host_link": ("bytes", hardware.host_link_s),
        "beside_copies": (
            "copies",
            lambda n: expert_s(BESIDE_TOKENS) + n * hardware.host_link_processor_share * copy_s,
        ),
        "copy": ("bytes", lambda n: hardware.operator_s + n / copy_rate),
        "all_to_all": ("bytes", exchange_s),
        "layer": ("tokens", lambda _: hardware.runtime_layer_s + 3 * exchange_s(0)),
        "early": ("rows", lambda _: hardware.early_s),
    }
    for key, points in samples.items():
        for size, seconds in points:
            unit, fitted_s = fits[key]
            table.add_row(key, f"{size:,.0f} {unit}", f"{seconds * 1e3:.3f} ms", f"{fitted_s(size) * 1e3:.3f} ms")
    console = Console()
    console.print(table)
    cost = hardware.expert_cost(expert_bytes=expert.num_bytes, flops_per_token=expert.flops_per_token)
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
    device = Device.of(torch.device(device_type))
    if device.num_here is not None and arguments.world_size > device.num_here:
        parser.error(f"--world-size: {arguments.world_size}, must be at most {device.num_here} CUDA devices")
    expert = Expert(arguments.hidden_size, arguments.intermediate_size, arguments.dtype)
    try:
        hardware, samples = calibrate(arguments.name, expert, arguments.world_size, device_type, arguments.rounds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    threads = max(1, usable_cores().number // arguments.world_size)
    write(
        hardware,
        path,
        f"Measured by scripts/calibrate.py on {datetime.now(UTC):%Y-%m-%d}, {arguments.world_size} ranks at once:\n"
        f"{device.name}, {threads} threads per rank, PyTorch {torch.__version__},\n"
        f"expert {expert.hidden_size}/{expert.intermediate_size}, {expert.dtype}.",
    )
    _report(hardware, expert, samples)
    print(f"written: {path}; use it as: python run.py hardware={arguments.name} ...")


if __name__ == "__main__":
    main()
