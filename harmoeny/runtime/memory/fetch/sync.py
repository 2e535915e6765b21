"""Blocking fetches: computation waits for every copy."""

from __future__ import annotations

from typing import ClassVar

from harmoeny.choices import Fetch
from harmoeny.runtime.memory.fetch.base import FetchStrategy


class SyncFetch(FetchStrategy):
    """HarMoEny without overlap: a fetch begins when its expert's turn comes, restores right after the layer."""

    name: ClassVar[Fetch] = Fetch.SYNC
    ahead: ClassVar[bool] = False
