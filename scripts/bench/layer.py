"""What a MoE layer costs beside its experts' matrix products, and how it compares with Transformers' own experts.

On `--world-size` ranks, without skew: the layer under HarMoEny and static EP, its phases, and the share of it that is
not the experts' matrix products, which are timed alone on the same slices. On one rank: the layer against the eager
experts of Transformers' Switch. Rounds are interleaved; ratios are medians of paired rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from baselines.static_ep import StaticEP
from experiments.launch.calls import call_on_ranks
from experiments.routers.base import RoutingRequest
from experiments.routers.uniform import UniformRouter
from harmoeny.models.moe_stack import MoEStack
from harmoeny.runtime.device import Device, best_device_type
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.recorder import PHASES
from harmoeny.runtime.layer.system import System
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.slots import SlotPool
from harmoeny.runtime.start import start_rank
from harmoeny.timed import HarMoEny
from results_schema.printing import print_anything

OVERHEAD_BUDGET = 0.1
_NUM_EXPERTS = 16
_NUM_TOKENS = 2048
_HIDDEN_SIZE, _INTERMEDIATE_SIZE = 768, 3072
_WARM_UP = 2


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure as one of the ranks: seconds by what was timed, and by system and phase."""
    comm = Communicator(device)
    config = MoEStack(
        num_experts=_NUM_EXPERTS, hidden_size=_HIDDEN_SIZE, intermediate_size=_INTERMEDIATE_SIZE, vocab_size=1
    )
    engine = start_rank(config.build(0).experts, comm)
    cost = engine.memory.cost
    systems = [engine.build_system(p.name, p.calibrated(cost)) for p in (HarMoEny(), StaticEP())]
    request = RoutingRequest(
        num_tokens=_NUM_TOKENS, num_experts=_NUM_EXPERTS, top_k=1, batch=0, layer=0, rank=comm.rank, seed=0,
        world_size=comm.world_size,
    )  # fmt: skip
    expert_ids = torch.from_numpy(UniformRouter().assign(request)).to(device)
    hidden = torch.randn(_NUM_TOKENS, _HIDDEN_SIZE, generator=torch.Generator().manual_seed(comm.rank)).to(device)
    weights = torch.rand(_NUM_TOKENS, 1, generator=torch.Generator().manual_seed(comm.rank)).to(device)

    def layer() -> Tensor:
        engine.recorder.begin_layer(0)
        return engine.forward(0, hidden, expert_ids, weights)

    actions: dict[str, Callable[[], Any]] = {
        **dict.fromkeys((system.name for system in systems), layer),
        "matrix_products": matrix_products(engine.memory.pool, device, comm),
    }
    if comm.world_size == 1:
        actions["transformers_eager"] = transformers_eager(engine.memory.store.layers[0], hidden, expert_ids, weights)
    times, phases = _time_in_turns(actions, {system.name: system for system in systems}, engine, rounds)
    engine.close()
    return {"times_s": times, "phases_s": phases, "threshold": cost.threshold_tokens()}


def _time_in_turns(
    actions: Mapping[str, Callable[[], Any]], systems: Mapping[str, System], engine: ExpertParallel, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Return seconds per round by action, and of systems those of every phase; a round calls every action once."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    phases: dict[str, list[list[float]]] = {name: [] for name in systems}
    for index in range(-_WARM_UP, rounds):
        for name, action in actions.items():
            if name in systems:
                engine.use(systems[name])
            engine.recorder.begin_iteration()
            engine.comm.barrier()
            start = time.perf_counter()
            action()
            Device.of(engine.comm.device).synchronize_compute()
            elapsed = time.perf_counter() - start
            engine.finish()
            if index >= 0:
                times[name].append(elapsed)
                for layer in engine.recorder.collect():
                    phases[name].append([layer.phase_s(phase) for phase in PHASES])
    return times, phases


def matrix_products(pool: SlotPool, device: torch.device, comm: Communicator) -> Callable[[], None]:
    """Return what multiplies the rows that this rank executes, in the slices that it executes them in."""
    own = range(comm.rank * _NUM_EXPERTS // comm.world_size, (comm.rank + 1) * _NUM_EXPERTS // comm.world_size)
    per_expert = _NUM_TOKENS * comm.world_size // _NUM_EXPERTS
    rows = torch.randn(per_expert * len(own), _HIDDEN_SIZE).to(device)
    out = torch.empty_like(rows)

    def run() -> None:
        held: dict[int, Mapping[str, Tensor]] = {slot.expert_id: slot.weights for slot in pool.layers[0].slots}
        for index, expert_id in enumerate(own):
            part = slice(index * per_expert, (index + 1) * per_expert)
            up = torch.mm(rows[part], held[expert_id]["up"].t())
            torch.mm(up, held[expert_id]["down"].t(), out=out[part])

    return run


def transformers_eager(
    experts: LayerExperts, hidden: Tensor, expert_ids: Tensor, weights: Tensor
) -> Callable[[], Tensor]:
    """Return Transformers' own computation of the same layer, with the same weights and routing."""
    config = SwitchTransformersConfig(
        d_model=_HIDDEN_SIZE, d_ff=_INTERMEDIATE_SIZE, num_experts=_NUM_EXPERTS, dropout_rate=0.0
    )
    with torch.device("meta"):
        module = SwitchTransformersExperts(config).eval()
    for expert_id in range(_NUM_EXPERTS):
        expert = module[f"expert_{expert_id}"]
        for linear, name in ((expert.wi, "up"), (expert.wo, "down")):
            linear.weight = torch.nn.Parameter(experts.weights[name][expert_id].to(hidden.device), requires_grad=False)
    mask = torch.nn.functional.one_hot(expert_ids, _NUM_EXPERTS)

    def run() -> Tensor:
        output: Tensor = module(hidden, mask, weights)
        return output

    return run


def summarise(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduce to medians: a layer takes as long as its slowest rank, ratios are paired by round."""
    names = list(by_rank[0]["times_s"])
    slowest = {n: [max(r) for r in zip(*(rank["times_s"][n] for rank in by_rank), strict=True)] for n in names}
    summary: dict[str, Any] = {"threshold": by_rank[0]["threshold"], "layer_s": {}, "phases_s": {}}
    for name, times in slowest.items():
        summary["layer_s"][name] = median(times)
    for system in by_rank[0]["phases_s"]:
        per_phase = [list(zip(*rank["phases_s"][system], strict=True)) for rank in by_rank]
        summary["phases_s"][system] = {
            phase.name.lower(): max(median(rank[phase]) for rank in per_phase) for phase in PHASES
        }
    summary["overhead_share"] = {
        system: median(1 - p / t for p, t in zip(slowest["matrix_products"], slowest[system], strict=True))
        for system in by_rank[0]["phases_s"]
    }
    if "transformers_eager" in slowest:
        summary["ratio_to_transformers_eager"] = {
            system: median(t / e for t, e in zip(slowest[system], slowest["transformers_eager"], strict=True))
            for system in by_rank[0]["phases_s"]
        }
    return summary


def _print(summary: dict[str, Any], world_size: int, device: str, console: Console) -> None:
    table = Table(
        title=f"One MoE layer, {_NUM_EXPERTS} experts {_HIDDEN_SIZE}/{_INTERMEDIATE_SIZE}, {_NUM_TOKENS} tokens per "
        f"rank, {world_size} ranks, no skew",
        caption=device,
    )
    columns = ("layer", "ms", "beside matrix products", *(p.name.lower() for p in PHASES))
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, seconds in summary["layer_s"].items():
        share = summary["overhead_share"].get(name)
        phases = summary["phases_s"].get(name, {})
        table.add_row(
            name,
            f"{seconds * 1e3:.1f}",
            "" if share is None else f"{share:.1%}",
            *(f"{phases[p.name.lower()] * 1e3:.2f}" if phases else "" for p in PHASES),
        )
    console.print(table)
    for system, ratio in summary.get("ratio_to_transformers_eager", {}).items():
        console.print(f"{system}: {ratio:.3f} times the time of Transformers' eager experts (below 1 is faster)")


def main() -> None:
    """Measure, print and compare with the budgets."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.layer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parser.add_argument(
        "--world-size", type=int, default=2, help="ranks, beside the one-rank run (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.world_size < 1 or _NUM_EXPERTS % arguments.world_size:
        parser.error(f"--rounds must be at least 1, --world-size a divisor of {_NUM_EXPERTS}")
    device_type = best_device_type()
    device = Device.of(torch.device(device_type)).name
    console = Console()
    results: dict[str, Any] = {"device": device, "torch": torch.__version__}
    missed = []
    for world_size in dict.fromkeys((1, arguments.world_size)):
        summary = summarise(call_on_ranks(world_size, device_type, measure, arguments.rounds))
        results[f"world_size_{world_size}"] = summary
        _print(summary, world_size, device, console)
        missed += [
            f"{system} on {world_size} ranks: {share:.1%} beside the matrix products, budget {OVERHEAD_BUDGET:.0%}"
            for system, share in summary["overhead_share"].items()
            if share > OVERHEAD_BUDGET
        ]
        missed += [
            f"{system} on one rank: {ratio:.3f} times Transformers' eager experts, budget 1"
            for system, ratio in summary.get("ratio_to_transformers_eager", {}).items()
            if ratio > 1
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for line in missed:
        console.print(f"missed: {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
