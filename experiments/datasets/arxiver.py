"""arXiver: papers of arXiv as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.datasets.hub import Hub


@dataclass(kw_only=True)
class Arxiver(Hub):
    """arXiver: papers of arXiv as Markdown."""

    name: ClassVar[str] = "arxiver"
    description: ClassVar[str] = "papers of arXiv (hub)"

    hub_name: str = "neuralwork/arxiver"
    text_field: str = "markdown"
