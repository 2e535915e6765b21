"""Looks at every plan of a check before it is carried out: ranks with different plans would wait for each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.system import System


class PlanError(RuntimeError):
    """A plan is wrong; raised on all ranks together, before anything is sent. The message says where."""


@contextmanager
def guarded_plans(system: System, comm: Communicator) -> Iterator[None]:
    """Look at all plans of a system meanwhile.

    Raises:
        PlanError: a policy raised, broke an invariant of plans, or has different plans on different ranks.
    """
    system.planner.guard = _Guard(system, comm)
    try:
        yield
    finally:
        system.planner.guard = None


@dataclass(frozen=True)
class _Seen:
    """What a rank made of a layer: a digest of its plan, or what is wrong with it."""

    digest: str
    problem: str | None = None


@dataclass(frozen=True)
class _Guard:
    system: System
    comm: Communicator

    def __call__(self, layer: int, counts: IntArray, make: Callable[[], Plan]) -> Plan:
        plan, seen = self._make(layer, counts, make)
        ranks: list[_Seen] = [seen] * self.comm.world_size
        if self.comm.world_size > 1:
            dist.all_gather_object(ranks, seen)
        for rank, other in enumerate(ranks):
            if other.problem is not None:
                raise PlanError(f"rank {rank}, MoE layer {layer}: {other.problem}")
            if other.digest != ranks[0].digest:
                raise PlanError(f"rank {rank}, MoE layer {layer}: the plan is not that of rank 0")
        assert plan is not None
        return plan

    def _make(self, layer: int, counts: IntArray, make: Callable[[], Plan]) -> tuple[Plan | None, _Seen]:
        planner = self.system.planner
        try:
            plan = make()
            plan.validate(counts, planner.placements[layer], exact=self.system.policy.exact)
        except Exception as error:  # noqa: BLE001  (whatever a policy raises; the other ranks wait for an answer)
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return None, _Seen("", f"{name}{error}")
        content = plan.tokens.tobytes() + plan.fetch.tobytes()
        content += b"".join(part.tobytes() for part in (plan.host, plan.early) if part is not None)
        return plan, _Seen(hashlib.sha256(content).hexdigest())
