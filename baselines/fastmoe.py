"""FastMoE's dispatch, which is static expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.static_ep import StaticEP


@dataclass(kw_only=True)
class FastMoE(StaticEP):
    """Static expert parallelism under the name of the system that the paper compares with (arXiv 2103.13262).

    FastMoE exchanges counts, scatters tokens by expert, executes every expert's tokens together on the rank where it
    lives, and gathers the results. That is what the runtime does with static EP's plan, so the two differ in nothing.
    """

    name: ClassVar[str] = "fastmoe"
    description: ClassVar[str] = "FastMoE's dispatch: another name for static_ep"
