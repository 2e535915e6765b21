"""BookCorpus: sentences of novels (Zhu et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.datasets.hub import Hub


@dataclass(kw_only=True)
class BookCorpus(Hub):
    """BookCorpus: sentences of novels (Zhu et al. 2015)."""

    name: ClassVar[str] = "bookcorpus"
    description: ClassVar[str] = "novels by unpublished authors (hub)"

    hub_name: str = "bookcorpus/bookcorpus"
