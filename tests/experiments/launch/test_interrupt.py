"""A signal ends a block wherever it finds it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
import weakref
from collections.abc import Iterator

import pytest

from experiments.launch.interrupt import interruptible
from experiments.launch.local import InterruptedRun


@pytest.fixture(autouse=True)
def _nothing_ignored() -> Iterator[None]:
    """A shell lets what it runs in the background ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python looks for signals here


class KillsWhenDestroyed:
    def __del__(self) -> None:
        kill()


class Node:
    """An object in a circle, which only the garbage collector finds."""

    def __init__(self) -> None:
        self.itself = self


def work() -> None:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        sum(range(100))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_plain_code(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (number, signal.SIGALRM)]
    with pytest.raises(InterruptedRun, match=number.name), interruptible():
        kill(number)
    assert [signal.getsignal(n) for n in (number, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_destructor() -> None:
    @interruptible()
    def run() -> None:
        KillsWhenDestroyed()
        work()

    start = time.monotonic()
    with pytest.raises(InterruptedRun):
        run()
    assert time.monotonic() - start < 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_of_the_garbage_collector() -> None:
    @interruptible()
    def run() -> None:
        node = Node()
        watched = weakref.ref(node, lambda _: kill())
        del node
        gc.collect()
        assert watched() is None
        work()

    start = time.monotonic()
    with pytest.raises(InterruptedRun):
        run()
    assert time.monotonic() - start < 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_of_c_code_whose_loss_is_an_error() -> None:
    @interruptible()
    def run() -> None:
        found: list[int] = []

        def callback() -> None:
            kill()
            found.append(1)

        ctypes.CFUNCTYPE(None)(callback)()
        if not found:
            raise RuntimeError("the callback has not done what it had to")

    with pytest.raises(InterruptedRun, match="SIGTERM"):
        run()


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), interruptible():
        _ = 1 / 0


def test_what_notes_the_interruption_is_left_alone() -> None:
    noted = []

    @interruptible()
    def run() -> None:
        try:
            kill()
        except InterruptedRun:
            time.sleep(0.3)  # several times as long as until it would be raised again
            noted.append("manifest")
            raise

    with pytest.raises(InterruptedRun):
        run()
    assert noted == ["manifest"]


def test_a_second_signal_does_not_disturb() -> None:
    @interruptible()
    def run() -> None:
        try:
            kill()
        except InterruptedRun:
            kill(signal.SIGINT)
            raise

    with pytest.raises(InterruptedRun, match="SIGTERM"):
        run()
