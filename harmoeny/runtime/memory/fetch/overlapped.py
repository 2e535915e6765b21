"""HarMoEny's prefetch: fetches run beside the computation of the experts that are there."""

from __future__ import annotations

from typing import ClassVar

from harmoeny.choices import Fetch
from harmoeny.runtime.memory.fetch.base import FetchStrategy


class AsyncFetch(FetchStrategy):
    """A fetch begins as soon as the plan is known and its slot is free (arXiv 2506.12417, section 4.2).

    Residents that were overwritten are restored behind the computation of later layers.
    """

    name: ClassVar[Fetch] = Fetch.ASYNC
