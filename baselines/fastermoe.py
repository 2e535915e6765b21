"""FasterMoE: the hottest experts are brought to all ranks where a cost model says that it pays; pairwise exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from harmoeny.choices import Fetch
from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class FasterMoE(Policy):
    """Two parts of FasterMoE (He et al., PPoPP 2022, doi 10.1145/3503221.3508418), for inference; each can be off.

    Dynamic shadowing. A shadowed expert's weights go to all ranks, which execute their own assignments of it; the other
    experts are executed at home. In every batch the most popular experts are shadowed, as many as give the least time
    by the model

        ``token_s * max load + 2 * max received / exchange_tokens_per_s + shadow_s * number of shadows``

    where the maxima are over ranks: the load is all assignments executed, received are those from other ranks, twice
    because results go back.

    Smart scheduling. The exchange is split into stages between groups of ranks, and rows are executed as they arrive.

    Attributes:
        shadowing: whether experts are shadowed; without, all are executed at home.
        smart_scheduling: whether exchange and computation overlap; without, they follow each other.
        group_size: ranks that a stage of the exchange sends to and receives from.
        token_s: seconds to execute one assignment; null: calibrated.
        shadow_s: seconds to bring one expert's weights to all ranks; null: calibrated.
        exchange_tokens_per_s: assignments per second that a rank receives; null: as calibrated.
    """

    name: ClassVar[str] = "fastermoe"
    can_stage: ClassVar[bool] = False
    description: ClassVar[str] = "shadows the hottest experts where a cost model says that it pays; overlaps exchange"

    fetch: str = Fetch.PEER.value
    shadowing: bool = True
    smart_scheduling: bool = True
    group_size: int = 1
    token_s: float | None = None
    shadow_s: float | None = None
    exchange_tokens_per_s: float | None = None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a cost that is not positive, or an option of a part that is off.
        """
        super().validate()
        if self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size}, must be at least 1")
        if self.group_size > 1 and not self.smart_scheduling:
            raise ValueError(f"group_size: {self.group_size}, must be 1, the default, with smart_scheduling=false")
        for name in ("token_s", "shadow_s", "exchange_tokens_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}, must be above 0, or null")
            if value is not None and not self.shadowing:
                raise ValueError(f"{name}: {value}, must be null with shadowing=false")

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the machine's costs, where they were not set."""
        if not self.shadowing:
            return self
        exchange = 1 / cost.exchange_token_s if cost.exchange_token_s > 0 else None
        shadow_s = cost.peer_fetch_s if self.fetch == Fetch.PEER and cost.peer_fetch_s > 0 else cost.fetch_s
        return replace(
            self,
            token_s=cost.token_s if self.token_s is None else self.token_s,
            shadow_s=shadow_s if self.shadow_s is None else self.shadow_s,
            exchange_tokens_per_s=exchange if self.exchange_tokens_per_s is None else self.exchange_tokens_per_s,
        )

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Execute ``counts`` (int64 ``[world_size, num_experts]``) at home, and where they are if shadowed.

        Raises:
            ValueError: the costs were neither set nor calibrated.
        """
        if not self.shadowing:
            plan = plan_from_tokens(home_tokens(counts, placement.home), placement)
            return replace(plan, source_groups=self._source_groups(len(counts)))
        if self.token_s is None or self.shadow_s is None:
            name = "token_s" if self.token_s is None else "shadow_s"
            raise ValueError(f"{name}: null, must be calibrated before planning (FasterMoE.calibrated)")
        exchange_s = 0.0 if self.exchange_tokens_per_s is None else 1.0 / self.exchange_tokens_per_s
        shadowed = choose_shadows(counts, placement.home, placement.resident, self.token_s, self.shadow_s, exchange_s)
        tokens, fetch = _execute(counts, placement.home, placement.resident, shadowed)
        return Plan(tokens=tokens, fetch=fetch, source_groups=self._source_groups(len(counts)))

    def _source_groups(self, world_size: int) -> list[list[int]] | None:
        """Return the groups that smart scheduling exchanges tokens with in turn, unless it is off."""
        if not self.smart_scheduling:
            return None
        return [
            list(range(first, min(first + self.group_size, world_size)))
            for first in range(0, world_size, self.group_size)
        ]


@compiled
def choose_shadows(
    counts: IntArray, home: IntArray, resident: BoolArray, token_s: float, shadow_s: float, exchange_s: float
) -> BoolArray:
    """Shadow the most popular experts, as many as the model finds fastest.

    With one expert per rank and the same counts on all ranks no other set of experts is faster by the model: its
    maxima come from the most popular expert that is not shadowed, so the experts above it suffice.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``; shadowing an expert that all ranks hold costs nothing.
        token_s: seconds to execute one assignment.
        shadow_s: seconds per shadow.
        exchange_s: seconds to receive one assignment.

    Returns:
        bool ``[num_experts]``.
    """
    world_size, num_experts = counts.shape
    popularity = np.zeros(num_experts, dtype=np.int64)
    load = np.zeros(world_size, dtype=np.int64)
    received = np.zeros(world_size, dtype=np.int64)
    for expert in range(num_experts):
        popularity[expert] = counts[:, expert].sum()
        load[home[expert]] += popularity[expert]
        received[home[expert]] += popularity[expert] - counts[home[expert], expert]
    hottest_first = np.argsort(-popularity, kind="mergesort")
    shadows_s = 0.0
    best_s = token_s * load.max() + 2 * exchange_s * received.max()
    num_shadows = 0
    for i in range(num_experts):
        expert = hottest_first[i]
        load[home[expert]] -= popularity[expert]
        received[home[expert]] -= popularity[expert] - counts[home[expert], expert]
        load += counts[:, expert]
        if not resident[expert].all():
            shadows_s += shadow_s
        total_s = token_s * load.max() + 2 * exchange_s * received.max() + shadows_s
        if total_s < best_s:
            best_s = total_s
            num_shadows = i + 1
    shadowed = np.zeros(num_experts, dtype=np.bool_)
    shadowed[hottest_first[:num_shadows]] = True
    return shadowed


@compiled
def _execute(counts: IntArray, home: IntArray, resident: BoolArray, shadowed: BoolArray) -> tuple[IntArray, BoolArray]:
    world_size, num_experts = counts.shape
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    for src in range(world_size):
        for expert in range(num_experts):
            if counts[src, expert] > 0:
                dst = src if shadowed[expert] else home[expert]
                tokens[src, expert, dst] = counts[src, expert]
                fetch[expert, dst] = not resident[expert, dst]
    return tokens, fetch
