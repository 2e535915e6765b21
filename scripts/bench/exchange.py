"""What dispatch and combine of a MoE layer cost with collectives and with puts, in paired rounds on real ranks.

A layer takes as long as its slowest rank. Tokens are routed at random, every token to `--top-k` experts at their homes;
nothing is computed, and all ranks wait for each other before either half.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from rich.console import Console

from experiments.launch.calls import call_on_ranks
from harmoeny.choices import Exchange
from harmoeny.placement import place
from harmoeny.plan import plan_from_tokens
from harmoeny.runtime.device import Device, best_device_type
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.dispatch import combine, count_assignments, dispatch
from results_schema.printing import print_anything

_WARM_UP = 3
_KINDS = (Exchange.COLLECTIVE, Exchange.PUT)


def measure(
    device: torch.device, rounds: int, num_tokens: int, num_experts: int, top_k: int, hidden_size: int
) -> list[list[float]]:
    """Measure as one of the ranks: seconds of dispatch and combine by exchange and round."""
    comm = Communicator(device)
    exchanges = [open_exchange(comm, kind) for kind in _KINDS]
    generator = torch.Generator().manual_seed(comm.rank)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(device)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(device)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    expert_ids = scores.topk(top_k, dim=1).indices.to(device)
    placement = place("contiguous", num_experts, comm.world_size)
    times: list[list[float]] = [[] for _ in exchanges]
    for index in range(-_WARM_UP, rounds):
        for kind in range(len(exchanges)) if index % 2 else reversed(range(len(exchanges))):
            exchange = exchanges[kind]
            own_counts, numbers = count_assignments(expert_ids, num_experts)
            counts = exchange.gather_counts(own_counts)
            tokens = np.zeros((comm.world_size, num_experts, comm.world_size), dtype=np.int64)
            tokens[:, np.arange(num_experts), placement.home] = counts
            plan = plan_from_tokens(tokens, placement)
            comm.barrier()
            start = time.perf_counter()
            rows, dispatched = dispatch(hidden, expert_ids, counts, plan, exchange, numbers_TK=numbers)
            Device.of(device).synchronize()
            elapsed = time.perf_counter() - start
            results = rows.clone()
            comm.barrier()
            start = time.perf_counter()
            combine(results, weights, dispatched)
            Device.of(device).synchronize()
            if index >= 0:
                times[kind].append(elapsed + time.perf_counter() - start)
    for exchange in exchanges:
        exchange.close()
    return times


def main() -> None:
    """Measure on several numbers of ranks and print ratios."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.exchange", description=__doc__)
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4], help="ranks (default: 2 4)")
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per rank (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="experts (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=1, help="experts per token (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=768, help="numbers of a token (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = (arguments.rounds, arguments.tokens, arguments.experts, arguments.top_k, arguments.hidden_size)
    device_type = best_device_type()
    console = Console()
    for world_size in arguments.world_size:
        by_rank = call_on_ranks(world_size, device_type, measure, *sizes)
        collective, put = np.max(by_rank, axis=0)
        ratios = put / collective
        resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
        console.print(
            f"{world_size} ranks, {Device.of(torch.device(device_type)).name}: dispatch + combine "
            f"{np.median(collective) * 1e3:.1f} ms collective, {np.median(put) * 1e3:.1f} ms put; "
            f"put / collective {np.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
