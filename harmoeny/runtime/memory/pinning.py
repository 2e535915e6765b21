"""Host memory that CUDA may copy from beside its computation: registered in place and once, while it is needed.

What is small is copied into memory that was locked when it was made. Whole pages are locked, an allocator puts other
tensors on the pages of a small one, and CUDA refuses to copy what lies on locked pages in part ("invalid argument").
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The C library maps memory of this size on pages of its own (M_MMAP_THRESHOLD's largest value, mallopt(3)).
_OWN_PAGES_BYTES = 32 * 2**20


class Pages(NamedTuple):
    """Whole pages: addresses ``[begin, end)``."""

    begin: int
    end: int


class Pins:
    """What is registered in this process.

    CUDA registers pages, refuses one that is registered already, and gives up only whole ranges as they were
    registered. Stores may have tensors in common, or parts of one mapped file; so what is registered are the joined
    ranges of all that is wanted, and a range is registered anew where one of its owners comes or goes.
    """

    def __init__(self, register: Callable[[Pages], None], unregister: Callable[[Pages], None]) -> None:
        self._register, self._unregister = register, unregister
        self._wanted: list[Pages] = []
        self._registered: set[Pages] = set()

    def add(self, pages: Sequence[Pages]) -> None:
        """Register pages, which may be registered already; if that fails, nothing is changed.

        Raises:
            RuntimeError: CUDA refuses.
        """
        self._wanted += pages
        try:
            self._update()
        except RuntimeError:
            self.remove(pages)
            raise

    def remove(self, pages: Sequence[Pages]) -> None:
        """Take back what was added; pages that nobody else wants are given up."""
        for one in pages:
            self._wanted.remove(one)
        self._update()

    def _update(self) -> None:
        wanted = joined(self._wanted)
        for pages in self._registered - wanted:
            self._unregister(pages)
            self._registered.remove(pages)
        for pages in sorted(wanted - self._registered):
            self._register(pages)
            self._registered.add(pages)


def joined(ranges: Iterable[Pages]) -> set[Pages]:
    """Return ranges that have no page in common and together have all pages of those given."""
    found: list[Pages] = []
    for pages in sorted(ranges):
        if found and pages.begin < found[-1].end:
            found[-1] = Pages(found[-1].begin, max(found[-1].end, pages.end))
        else:
            found.append(pages)
    return set(found)


def with_own_pages(tensor: Tensor) -> Tensor:
    """Return a tensor whose pages can be registered: the same, or where it is small a copy, which is locked already."""
    return tensor if tensor.untyped_storage().nbytes() >= _OWN_PAGES_BYTES else tensor.pin_memory()


def pages_of(tensors: Iterable[Tensor]) -> list[Pages]:
    """Return the pages that large tensors lie on, one range per storage."""
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors) if s.nbytes() >= _OWN_PAGES_BYTES}
    size = mmap.PAGESIZE
    return [Pages(at // size * size, -(-(at + s.nbytes()) // size) * size) for at, s in sorted(storages.items())]


def _register(pages: Pages) -> None:
    cudart, num_bytes = torch.cuda.cudart(), pages.end - pages.begin  # type: ignore[no-untyped-call]
    try:
        torch.cuda.check_error(int(cudart.cudaHostRegister(pages.begin, num_bytes, 0)))
    except RuntimeError as error:
        # What ranks share lies in a file on disk where /dev/shm has no room for it, and the kernel may not lock that.
        raise RuntimeError(
            f"CUDA cannot lock {num_bytes / 2**20:.0f} MiB of host memory ({error}): /dev/shm must have room for "
            "the model's weights (df -h /dev/shm)"
        ) from error


def _unregister(pages: Pages) -> None:
    torch.cuda.synchronize()  # a copy from here may be under way
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(cudart.cudaHostUnregister(pages.begin)))


#: All stores of the process share it.
PINS = Pins(_register, _unregister)
