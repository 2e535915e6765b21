"""Systems that place experts or move weights, in the runtime on ranks that are threads, over batches that change."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor

from baselines.cpu_gpu_lru import CpuGpuLru
from baselines.eplb import EPLB
from baselines.eplb_lp import EPLBWithLP
from baselines.eps_moe import EpsMoE
from baselines.exflow import ExFlow
from baselines.fastermoe import FasterMoE
from baselines.flashlb import FlashLB
from baselines.gpu_ndp import GpuNdp
from baselines.hybrimoe import HybriMoE
from baselines.ideal import Ideal
from baselines.kit.replicas import ReplicatingPolicy
from baselines.libra import Libra
from baselines.llep import LLEP
from baselines.lplb import LPLB
from baselines.metro import METRO
from baselines.moonep import MoonEP
from baselines.on_demand import OnDemand
from baselines.pregated import PreGated
from baselines.trtllm_eplb import TRTLLMEPLB
from baselines.ultraep import UltraEP
from harmoeny.cost import ExpertCost
from harmoeny.policy import Policy
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.timed import HarMoEny
from harmoeny.trace import RoutingTrace
from tests.harmoeny.runtime.cases import Tokens, expected_output, random_experts, random_tokens, start
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads

WORLD_SIZE, NUM_EXPERTS, NUM_LAYERS, NUM_BATCHES = 4, 8, 2, 5


def experts_of(layer: int) -> LayerExperts:
    return random_experts(NUM_EXPERTS, seed=layer)


@cache
def batch_tokens(batch: int, layer: int, rank: int) -> Tokens:
    """Two thirds of the first choices are one expert, another one in every batch and layer."""
    t = random_tokens(100 * batch + 10 * layer + rank, 24, NUM_EXPERTS, 2)
    hot = (3 * batch + layer) % NUM_EXPERTS
    ids = t.ids.clone()
    ids[:16, 0] = hot
    ids[:16, 1] = torch.where(ids[:16, 1] == hot, (hot + 1) % NUM_EXPERTS, ids[:16, 1])
    return Tokens(t.hidden, ids, t.weights)


@cache
def dense_output(batch: int, layer: int, rank: int) -> Tensor:
    """Return what a batch must give, worked out once for all systems: it takes longer than they do."""
    t = batch_tokens(batch, layer, rank)
    return expected_output(experts_of(layer), t.hidden, t.ids, t.weights, torch.ones_like(t.ids, dtype=torch.bool))


def fitted(policy: Policy) -> Policy:
    ids = [
        torch.cat([batch_tokens(9, layer, rank).ids for rank in range(WORLD_SIZE)]).numpy()
        for layer in range(NUM_LAYERS)
    ]
    return policy.fitted(RoutingTrace(ids, [0] * NUM_LAYERS), NUM_EXPERTS, WORLD_SIZE)


#: Ranks hold one of their two experts; a fetch takes as long as a few tokens, on the device and on the host.
HOSTS = ExpertCost(token_s=1e-5, fetch_s=5e-5, host_token_s=2e-5)


def uses_hosts(policy: Policy) -> bool:
    return policy.caches and not isinstance(policy, OnDemand | PreGated)


@pytest.mark.many
@pytest.mark.parametrize(
    "policy",
    [
        fitted(Libra(spare_slots=2, fetch="async")),
        fitted(Libra(spare_slots=2, fetch="sync")),
        EPLB(interval=1, window=1),
        EPLB(interval=1, window=2, fetch="sync"),
        EPLB(interval=2, redundant_experts_per_rank=2, num_nodes=2, num_groups=4),
        EPLBWithLP(interval=1, window=1),
        EpsMoE(num_stages=2),
        FasterMoE(token_s=1.0, shadow_s=1.0),
        FasterMoE(token_s=1.0, shadow_s=1.0, fetch="async", num_slots=3),
        UltraEP(spare_slots=1),
        UltraEP(spare_slots=2, fetch="async"),
        LLEP(min_tokens=1),
        MoonEP(),
        METRO(interval=1, window=1),
        TRTLLMEPLB(interval=1, decay=0.0),
        LPLB(interval=1, window=1),
        FlashLB(interval=1, window=1, least_imbalance=1.0),
        Ideal(),
        fitted(ExFlow(node_limit=0)),
        OnDemand(num_slots=1),
        CpuGpuLru(num_slots=1),
        fitted(PreGated(num_slots=1)),
        fitted(HybriMoE(num_slots=1)).calibrated(HOSTS),
        GpuNdp(num_slots=1).calibrated(HOSTS),
        HarMoEny(num_slots=1).calibrated(HOSTS),
    ],
    ids=lambda policy: f"{policy.name}-{policy.fetch}",
)
@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_output_is_the_dense_one_in_every_batch(policy: Policy, kernel: str) -> None:
    layers = [experts_of(layer) for layer in range(NUM_LAYERS)]

    def rank_main(comm: ThreadCommunicator) -> tuple[float, int, int]:
        engine = start(layers, comm, kernel=kernel, host_threads=int(policy.needs_host or policy.caches))
        system = engine.build_system("x", deepcopy(policy))  # what it learns it learns on every rank
        worst, changes = 0.0, 0
        for batch in range(NUM_BATCHES):
            before = [placement.resident.copy() for placement in system.planner.placements]
            engine.use(system)
            engine.recorder.begin_iteration()
            for layer in range(NUM_LAYERS):
                t = batch_tokens(batch, layer, comm.rank)
                engine.recorder.begin_layer(layer)
                output = engine.forward(layer, t.hidden, t.ids, t.weights)
                expected = dense_output(batch, layer, comm.rank)
                worst = max(worst, float((output.double() - expected).abs().max() / expected.abs().max()))
            engine.finish()
            changes += sum(
                bool((new.resident != old).any()) for new, old in zip(system.planner.placements, before, strict=True)
            )
        found = worst, changes, sum(times.marks.host.num_tokens for times in engine.recorder.collect())
        engine.close()
        return found

    results = run_threads(WORLD_SIZE, rank_main)
    assert max(worst for worst, _, _ in results) <= 1e-5
    least = NUM_LAYERS if isinstance(policy, ReplicatingPolicy) or policy.caches else 0
    assert all(changes >= least for _, changes, _ in results)
    assert len({changes for _, changes, _ in results}) == 1
    assert any(tokens > 0 for _, _, tokens in results) == uses_hosts(policy)
