"""Blocking fetches: computation waits for every load."""

from __future__ import annotations

from typing import ClassVar

from harmoeny.choices import Fetch
from harmoeny.runtime.memory.fetch.base import FetchStrategy


class SyncFetch(FetchStrategy):
    """HarMoEny without overlap: an expert is loaded when it is to be executed, overwritten residents right after."""

    name: ClassVar[Fetch] = Fetch.SYNC
    ahead: ClassVar[bool] = False
