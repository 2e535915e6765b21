"""Times several ways of doing the same thing in interleaved rounds, each forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from analysis.data.stats import median_interval, paired_ratio
from harmoeny.runtime.device import Device

_WARM_UP = 3


def interleave(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Time actions in rounds that run A B C C B A, so that a machine that slows down evenly favours none.

    Args:
        actions: by name; called on this thread, and over when the device has nothing left to do.
        device: where they compute.
        rounds: measured ones; three more come first and are thrown away.
        prepare: by name, what is called before an action and not timed.

    Returns:
        For every action and round the mean of its two times, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(-_WARM_UP, rounds):
        taken: dict[str, float] = dict.fromkeys(actions, 0.0)
        for name in [*actions, *reversed(list(actions))]:
            if prepare and name in prepare:
                prepare[name]()
            Device.of(device).synchronize()
            start = time.perf_counter()
            actions[name]()
            Device.of(device).synchronize()
            taken[name] += (time.perf_counter() - start) / 2
        if index >= 0:
            for name, seconds in taken.items():
                times[name].append(seconds)
    return times


def compare(times: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Return medians in seconds and paired ratios to ``base``, with 95 % intervals, by name."""
    return {
        name: {"time_s": asdict(median_interval(taken)), f"ratio_to_{base}": asdict(paired_ratio(taken, times[base]))}
        for name, taken in times.items()
    }
