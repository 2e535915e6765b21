"""One system under test on one rank: its name, what plans for it, and what carries the plans out."""

from __future__ import annotations

from dataclasses import dataclass

from harmoeny.policy import Policy
from harmoeny.runtime.layer.executor import Executor
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.memory.fetch.base import FetchStrategy


@dataclass(frozen=True)
class System:
    """One system under test on one rank.

    Attributes:
        name: its name in records.
        planner: its policy, placements and history.
        executor: carries the plans out.
    """

    name: str
    planner: Planner
    executor: Executor

    @property
    def policy(self) -> Policy:
        """What makes the plans."""
        return self.planner.policy

    @property
    def fetcher(self) -> FetchStrategy:
        """This rank's expert memory."""
        return self.planner.fetcher
