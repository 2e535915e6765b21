"""WMT19: sentences for machine translation (news, parliament), of which one language is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.datasets.hub import Hub


@dataclass(kw_only=True)
class WMT19(Hub):
    """WMT19: sentences for machine translation (news, parliament), of which one language is read."""

    name: ClassVar[str] = "wmt19"
    description: ClassVar[str] = "English side of news and parliament, for translation (hub)"

    hub_name: str = "wmt/wmt19"
    config_name: str | None = "de-en"
    text_field: str = "translation.en"
