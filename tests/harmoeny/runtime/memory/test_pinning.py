"""Pinned pages against a stand-in for CUDA that is as strict as CUDA."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.runtime.memory import pinning
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.pinning import Pages, Pins, pages_of
from tests.harmoeny.runtime.cases import random_experts


class Cuda:
    """Registers ranges of pages: none twice, and gives up only what was registered, by where it begins."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.refuse_from = 10**9

    def register(self, pages: Pages) -> None:
        if pages.end > self.refuse_from:
            raise RuntimeError("out of memory")
        if any(begin < pages.end and pages.begin < end for begin, end in self.ranges.items()):
            raise RuntimeError("error 712: already mapped")
        self.ranges[pages.begin] = pages.end

    def unregister(self, pages: Pages) -> None:
        if self.ranges.pop(pages.begin, None) != pages.end:
            raise RuntimeError("error 713: not registered")

    def holds(self, pages: Pages) -> bool:
        """Whether one registration has all of it, as one copy needs."""
        return any(begin <= pages.begin and pages.end <= end for begin, end in self.ranges.items())


ranges = st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda p: Pages(p[0], p[0] + p[1]))


@settings(deadline=None, max_examples=200)
@given(stores=st.lists(st.lists(ranges, min_size=1, max_size=4), max_size=6), data=st.data())
def test_what_is_wanted_is_registered_and_nothing_else(stores: list[list[Pages]], data: st.DataObject) -> None:
    cuda = Cuda()
    pins = Pins(cuda.register, cuda.unregister)
    held: list[list[Pages]] = []
    for store in stores:
        pins.add(store)
        held.append(store)
        if data.draw(st.booleans()):
            pins.remove(held.pop(data.draw(st.integers(0, len(held) - 1))))
        assert all(cuda.holds(pages) for of_store in held for pages in of_store)
        wanted = {page for of_store in held for pages in of_store for page in range(*pages)}
        assert {page for begin, end in cuda.ranges.items() for page in range(begin, end)} == wanted
    for store in held:
        pins.remove(store)
    assert not cuda.ranges


def test_what_is_refused_leaves_everything_as_it_was() -> None:
    cuda = Cuda()
    pins = Pins(cuda.register, cuda.unregister)
    pins.add([Pages(0, 4)])
    cuda.refuse_from = 20
    with pytest.raises(RuntimeError, match="out of memory"):
        pins.add([Pages(2, 6), Pages(30, 40)])
    assert cuda.ranges == {0: 4}
    pins.remove([Pages(0, 4)])
    assert not cuda.ranges


def strict(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    cuda.refuse_from = 2**64
    monkeypatch.setattr(pinning, "PINS", Pins(cuda.register, cuda.unregister))
    return cuda


def test_what_is_small_may_share_its_pages_and_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, copied = strict(monkeypatch), list[Tensor]()

    def pin_memory(own: Tensor) -> Tensor:
        copied.append(own)
        return own.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    small, large = random_experts(3, 0), random_experts(2, 1, hidden_size=2**11, width=2**12)
    store = ExpertStore([small, large], pin=True)
    assert {id(w) for w in copied} == {id(w) for w in small.weights.values()}
    for experts, there in zip([small, large], store.layers, strict=True):
        assert all(torch.equal(w, there.weights[name]) for name, w in experts.weights.items())
    assert all(w is store.layers[1].weights[name] for name, w in large.weights.items())
    assert all(cuda.holds(pages) for pages in pages_of(large.weights.values()))
    assert not any(cuda.holds(Pages(w.data_ptr(), w.data_ptr() + 1)) for w in small.weights.values())
    store.close()
    assert not cuda.ranges


def test_tensors_of_several_stores_that_share_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = strict(monkeypatch)
    monkeypatch.setattr(pinning, "_OWN_PAGES_BYTES", 1)
    layers = [random_experts(3, seed) for seed in range(16)]  # hundreds of bytes each: many share a page
    stores = [ExpertStore(layers[i : i + 4], pin=True) for i in range(0, 16, 4)]
    for layer in layers:
        assert all(cuda.holds(pages) for pages in pages_of(layer.weights.values()))
    stores[0].close()
    stores[0].close()  # closing twice is no error
    for layer in layers[4:]:
        assert all(cuda.holds(pages) for pages in pages_of(layer.weights.values()))
    del stores[1]  # nobody closed it
    for store in stores[1:]:
        store.close()
    assert not cuda.ranges


def test_pages_of_tensors() -> None:
    one = torch.zeros(2**25 + mmap.PAGESIZE, dtype=torch.uint8)
    (pages,) = pages_of([one, one[5:]])
    assert pages.begin % mmap.PAGESIZE == pages.end % mmap.PAGESIZE == 0
    assert pages.begin <= one.data_ptr() < one.data_ptr() + one.nbytes <= pages.end
    assert pages.end - pages.begin <= one.nbytes + 2 * mmap.PAGESIZE
    assert pages_of([torch.empty(0), torch.empty(100)]) == []


def test_memory_that_cuda_does_not_lock_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        raise RuntimeError(f"invalid argument ({code})")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 1))
    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    with pytest.raises(
        RuntimeError, match=r"^CUDA cannot lock 2 MiB .*invalid argument \(1\)\): /dev/shm must have room"
    ):
        pinning._register(Pages(0, 2 * 2**20))
