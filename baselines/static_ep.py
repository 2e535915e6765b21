"""Static expert parallelism: every expert is executed where it lives, whatever the load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harmoeny.choices import Knowledge
from harmoeny.placement import BoolArray, Placement
from harmoeny.policy import BlindPolicy


@dataclass(kw_only=True)
class StaticEP(BlindPolicy):
    """Expert parallelism as GShard introduced it (arXiv 2006.16668), without a capacity limit."""

    name: ClassVar[str] = "static_ep"
    description: ClassVar[str] = "every expert is executed on its home rank"
    knows: ClassVar[frozenset[Knowledge]] = frozenset()

    def serving(self, placement: Placement) -> BoolArray | None:  # noqa: ARG002  (only the homes matter)
        """Return None: the home ranks alone."""
        return None
