"""What the tests of the report share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def few_resamples() -> Iterator[None]:
    """Fewer resamples make the same intervals coarser; here it matters only that they are shown as computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.data.stats._RESAMPLES", 100)
        yield
