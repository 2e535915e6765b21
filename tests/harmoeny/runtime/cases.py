"""Random MoE layers, and what they must compute: every assignment by its own expert, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.choices import Knowledge
from harmoeny.cost import ExpertCost
from harmoeny.head_start import HeadStart
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan, plan_from_tokens
from harmoeny.policy import Policy
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts, gated_mlp, mlp, swiglu
from harmoeny.runtime.start import start_rank

COST = ExpertCost(token_s=1e-5, fetch_s=5e-5)
#: Relative to the largest output; BF16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
CPU = torch.device("cpu")


def random_experts(
    num_experts: int, seed: int, *, hidden_size: int = 8, width: int = 12, gated: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LayerExperts:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    first, rows = ("gate_up", 2 * width) if gated else ("up", width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = {first: draw(num_experts, rows, hidden_size), "down": draw(num_experts, hidden_size, width)}
    if bias:
        weights |= {f"{first}_bias": draw(num_experts, rows), "down_bias": draw(num_experts, hidden_size)}
    return LayerExperts(weights, gated_mlp(swiglu) if gated else mlp(torch.relu), hidden_size)


def apply_expert(experts: LayerExperts, expert_id: int, token: Tensor) -> Tensor:
    """One expert on one token in double precision, written out."""
    w = {k: v[expert_id].double() for k, v in experts.weights.items()}
    x = token.double()
    if "gate_up" in w:
        both = w["gate_up"] @ x + w.get("gate_up_bias", torch.zeros(()))
        half = both.numel() // 2
        hidden = both[:half] * torch.sigmoid(both[:half]) * both[half:]
    else:
        hidden = (w["up"] @ x + w.get("up_bias", torch.zeros(()))).clamp(min=0)
    return w["down"] @ hidden + w.get("down_bias", torch.zeros(()))


def expected_output(experts: LayerExperts, hidden: Tensor, ids: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if kept[t, k]:
                output[t] += weights[t, k].double() * apply_expert(experts, int(ids[t, k]), hidden[t])
    return output


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens in one layer."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor


def random_tokens(
    seed: int, num_tokens: int, num_experts: int, top_k: int, *, hidden_size: int = 8,
    dtype: torch.dtype = torch.float32, masked: float = 0.0,
) -> Tokens:  # fmt: skip
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(num_experts, 0.3))
    scores = np.log(popularity + 1e-9) + rng.gumbel(size=(num_tokens, num_experts))
    ids = np.argsort(-scores, axis=1)[:, :top_k].copy()
    ids[rng.random(ids.shape) < masked] = -1
    hidden = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(dtype)
    weights = torch.from_numpy(rng.random((num_tokens, top_k))).to(dtype)
    return Tokens(hidden, torch.from_numpy(ids), weights)


def start(layers: list[LayerExperts], comm: Communicator | None = None, **options: Any) -> ExpertParallel:
    """The runtime on one rank, which by default is alone, without a calibration."""
    given: dict[str, Any] = {"cost": COST, "exchange": "collective"} | options
    return start_rank(layers, comm or Communicator(CPU), **given)


def random_senders(from_peer: BoolArray, home: IntArray, rng: np.random.Generator) -> IntArray:
    """Let every rank get an expert from its home, or from one of those before it that get it, too."""
    senders = np.full(from_peer.shape, -1)
    for expert, rank in np.argwhere(from_peer):
        senders[expert, rank] = rng.choice([home[expert], *np.flatnonzero(senders[expert] >= 0)])
    return senders


def hands_on(senders: IntArray) -> BoolArray:
    """Return bool ``[num_experts, world_size]``, who sends an expert to anybody."""
    ranks = np.arange(senders.shape[1])
    found: BoolArray = (senders[:, :, None] == ranks).any(axis=1)
    return found


class RandomPlan(Policy):
    """Sends assignments anywhere, fetches from anywhere, drops some if asked: the runtime must execute any plan."""

    name: ClassVar[str] = "random_plan"
    description: ClassVar[str] = "random plans"

    def __init__(
        self,
        seed: int,
        *,
        drop: bool = False,
        fetch: str = "async",
        num_slots: int | None = None,
        early: HeadStart | None = None,
        halves: bool = True,
    ) -> None:
        super().__init__(fetch=fetch, num_slots=num_slots)
        self.seed, self.drop, self.early, self.halves = seed, drop, early, halves

    def begin_early(self, placement: Placement) -> HeadStart | None:  # noqa: ARG002
        return self.early

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        world_size, num_experts = counts.shape
        rng = np.random.default_rng([self.seed, *counts.reshape(-1).tolist()])
        tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
        for src in range(world_size):
            for expert in range(num_experts):
                kept = int(counts[src, expert])
                if self.drop:
                    kept = int(rng.integers(0, kept + 1))
                tokens[src, expert] = rng.multinomial(kept, rng.dirichlet(np.full(world_size, 0.5)))
        plan = plan_from_tokens(tokens, placement)
        if self.seed % 3 == 0:
            return plan
        from_peer = rng.random(plan.fetch.shape) < 0.5
        halved = plan.fetch & from_peer & (rng.random(plan.fetch.shape) < 0.4 * self.halves)
        if self.seed % 3 == 1:
            return replace(plan, from_peer=from_peer, halved=halved)
        from_peer &= plan.fetch
        senders = random_senders(from_peer, placement.home, rng)
        return replace(plan, from_peer=from_peer, senders=senders, halved=halved & ~hands_on(senders))


class Shuffled(RandomPlan):
    """Places experts at random before every batch, with copies on some ranks."""

    name: ClassVar[str] = "shuffled"
    description: ClassVar[str] = "random placements"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})

    def update_placement(self, layer: int, history: Any, placement: Placement) -> Placement:
        rng = np.random.default_rng([self.seed, layer, len(history)])
        home = rng.integers(0, placement.world_size, placement.num_experts)
        resident = rng.random(placement.resident.shape) < 0.3
        resident[np.arange(placement.num_experts), home] = True
        return Placement(home=home, resident=resident)
