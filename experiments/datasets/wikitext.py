"""WikiText-103: good and featured articles of Wikipedia (Merity et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.datasets.hub import Hub


@dataclass(kw_only=True)
class WikiText(Hub):
    """WikiText-103: good and featured articles of Wikipedia (Merity et al. 2016)."""

    name: ClassVar[str] = "wikitext"
    description: ClassVar[str] = "articles of Wikipedia (hub)"

    hub_name: str = "Salesforce/wikitext"
    config_name: str | None = "wikitext-103-raw-v1"
