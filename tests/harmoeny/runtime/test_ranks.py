"""The layer on real ranks over gloo: the same exactness, and one copy of the weights per host."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from baselines.even_split import EvenSplit
from harmoeny.head_start import HeadStart
from harmoeny.models.moe_stack import MoEStack
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.sharing import share_model
from tests.harmoeny.runtime.cases import (
    COST,
    CPU,
    RandomPlan,
    Shuffled,
    expected_output,
    random_experts,
    random_tokens,
    start,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def exactness(rank: int, exchange: str = "put") -> float:
    """Run every strategy over random plans and return the largest relative error."""
    comm = Communicator(CPU)
    layers = [random_experts(10, seed=layer) for layer in range(2)]
    engine = start(layers, comm, record=False, exchange=exchange, cost=replace(COST, peer_fetch_s=1e-5))
    policies = [
        *(RandomPlan(3, fetch=fetch, num_slots=2) for fetch in ("sync", "async", "peer")),
        RandomPlan(5, fetch="peer", num_slots=2),
        EvenSplit(fetch="peer"),
        Shuffled(4, fetch="peer", num_slots=4),
        TokenHarMoEny(threshold=1),
        TokenHarMoEny(threshold=1, placement="round_robin"),
        RandomPlan(6, fetch="peer", early=HeadStart(8, 0, 2, 1, 1000)),
    ]
    worst = 0.0
    for policy in policies:
        engine.use(engine.build_system("x", policy))
        for batch in range(2):
            for layer, inference in enumerate((True, False)):
                tokens = random_tokens(100 * batch + 10 * layer + rank, 13 * ((rank + batch) % 3), 10, 2)
                # What lives on from layer to layer is written in either mode, whichever it was made in.
                with torch.inference_mode() if inference else torch.no_grad():
                    output = engine.forward(layer, tokens.hidden, tokens.ids, tokens.weights)
                expected = expected_output(layers[layer], tokens.hidden, tokens.ids, tokens.weights, tokens.ids >= 0)
                if output.numel():
                    worst = max(worst, float((output - expected).abs().max() / expected.abs().max()))
        engine.finish()
    return worst


@pytest.mark.parametrize("exchange", ["collective", "put"])
def test_exact_on_three_ranks(tmp_path: Path, exchange: str) -> None:
    assert max(run_ranks(3, exactness, tmp_path, exchange)) < 1e-5


def halves_and_wholes(rank: int, exchange: str) -> tuple[bool, int]:
    """Return whether outputs are bit for bit those of whole fetches, and how many fetches were halved."""
    experts = random_experts(9, seed=1, gated=True, bias=True, width=9)
    engine = start([experts], Communicator(CPU), exchange=exchange, cost=replace(COST, peer_fetch_s=1e-5))
    outputs: list[list[torch.Tensor]] = []
    halved = 0
    for halves in (False, True):
        outputs.append([])
        for seed in (1, 2, 5, 8):  # those but the first hand weights on
            engine.use(engine.build_system("x", RandomPlan(seed, fetch="peer", num_slots=4, halves=halves)))
            tokens = random_tokens(seed + 10 * rank, 20, 9, 2)
            engine.recorder.begin_iteration()
            engine.recorder.begin_layer(0)
            outputs[-1].append(engine.forward(0, tokens.hidden, tokens.ids, tokens.weights))
            halved += sum(times.marks.fetch.num_halved_fetches for times in engine.recorder.collect())
        engine.finish()
    return all(map(torch.equal, *outputs)), halved


@pytest.mark.parametrize("exchange", ["collective", "put"])
def test_an_expert_that_comes_half_from_a_peer_is_the_same(tmp_path: Path, exchange: str) -> None:
    found = run_ranks(3, halves_and_wholes, tmp_path, exchange)
    assert all(same for same, _ in found)
    assert sum(halved for _, halved in found) > 3


def exactness_and_memory(rank: int) -> tuple[float, int, int]:
    """Return the largest relative error, by how much this rank's memory grew, and the size of the store, in bytes."""
    error = exactness(rank)
    hold_model(rank, MoEStack(num_experts=16, hidden_size=8, intermediate_size=8, vocab_size=512))
    comm = Communicator(CPU)
    before = pss_bytes()
    comm.barrier()
    # 16 experts of 2 x 512 x 2048 numbers in one layer: 128 MiB.
    held = hold_model(rank, MoEStack(num_experts=16, hidden_size=512, intermediate_size=2048, vocab_size=512))
    comm.barrier()
    after = pss_bytes()
    comm.barrier()
    return error, after - before, held.memory.store.nbytes


def hold_model(rank: int, config: MoEStack) -> ExpertParallel:
    """Build a model with its weights shared, and slots for one expert per rank, all in use."""
    comm = Communicator(CPU)
    model = config.build(0, "cpu" if rank == 0 else "meta")
    share_model(model, comm, rank)
    engine = start(model.experts, comm)
    model.connect(engine)
    engine.use(engine.build_system("x", TokenHarMoEny(threshold=1, num_slots=1)))
    for layer in model.experts:
        for weights in layer.weights.values():
            assert torch.isfinite(weights.sum())  # reads every page
    return engine


def pss_bytes() -> int:
    gc.collect()
    match = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert match
    return int(match[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="proportional memory is known on Linux only")
def test_eight_ranks_are_exact_and_hold_one_copy_of_the_weights(tmp_path: Path) -> None:
    rows = run_ranks(8, exactness_and_memory, tmp_path)
    assert max(error for error, _, _ in rows) < 1e-5
    store = rows[0][2]
    slots = 8 * store // 16
    assert store == 16 * 2 * 512 * 2048 * 4
    assert sum(grown for _, grown, _ in rows) <= 1.2 * store + slots


def groups_left(rank: int, exchange: str) -> int:
    """Return how many process groups there are more, after a system that sends weights was closed."""
    del rank
    before = len(distributed_c10d._world.pg_map)
    engine = start([random_experts(4, seed=0)], Communicator(CPU), record=False, exchange=exchange, cost=COST)
    engine.build_system("x", TokenHarMoEny(threshold=1, fetch="peer"))
    assert len(distributed_c10d._world.pg_map) > before
    engine.close()
    return len(distributed_c10d._world.pg_map) - before


@pytest.mark.parametrize("exchange", ["collective", "put"])
def test_process_groups_end_with_the_runtime(tmp_path: Path, exchange: str) -> None:
    assert run_ranks(2, groups_left, tmp_path, exchange) == [0, 0]
