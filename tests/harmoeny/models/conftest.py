"""What tests of small models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def warm_caches() -> Iterator[None]:
    """Sessions calibrate without emptying the caches, which takes most of a tiny model's time: what it costs is not
    what these tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmoeny.runtime.calibrate._SCRATCH_BYTES", 1)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread: several cost a small model more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
