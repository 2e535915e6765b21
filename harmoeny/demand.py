"""What the next batch of a layer is expected to need: popular experts, and those of the latest batch again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, FloatArray, IntArray

#: Weight of what is known of popularity, from one batch to the next, and of what is known of experts that come again.
_POPULAR_KEPT, _AGAIN_KEPT = 0.98, 0.98
#: Batches like the latest, at most, that all earlier ones count for: a prompt says much of the tokens that follow.
_MOST_BATCHES = 128.0
#: A batch of so many times as many assignments as the one before is a prompt, and what it keeps of what was known.
_PROMPT_TIMES, _PROMPT_KEPT = 4.0, 0.25
#: What one expert may take at most of the next batch's expectation because it was in the latest.
_MOST_AGAIN = 0.95
#: By how many standard deviations an expert has to be likelier to be copied in for another.
_LEAST_DEVIATIONS = 0.5
#: Places of numbers in what a layer is followed with: weight of popularity, latest assignments, and the sums of a
#: regression.
_WEIGHT, _LATEST, _TOGETHER, _ALONE = range(4)


class Demand:
    """Follows a layer's batches, one after the other.

    An expert's share of the next batch is ``again * latest + (1 - again) * popularity``: its share of the latest batch
    and, of all batches, the mean by assignments, in which older ones weigh less. How much comes again is the slope of a
    regression through the batches themselves: near 0 where tokens draw their experts independently, high where a token
    has the experts of the one before it (30 to 50 % in Mixtral, Huang et al., arXiv 2512.16473).
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seen = 0
        self._batch: IntArray | None = None
        self._popular = self._latest = np.empty(0)
        self._numbers = np.zeros(4)

    def expect(self, history: Sequence[IntArray], window: int) -> FloatArray:
        """Return float64 ``[num_experts]``, expected shares of the next batch's assignments.

        Args:
            history: int64 ``[world_size, num_experts]`` per batch, oldest first. Where only the latest is new since the
                last call, only that is looked at.
            window: latest batches that can be read.
        """
        follows = len(history) == self._seen + 1 and self._seen > 0 and history[-2] is self._batch
        if not follows:
            self._popular = np.zeros(history[-1].shape[1])
            self._latest, self._numbers = np.zeros_like(self._popular), np.zeros(4)
        for counts in history[-1:] if follows else history[-window:]:
            follow(counts, self._popular, self._latest, self._numbers)
        self._seen, self._batch = len(history), history[-1]
        return expected(self._popular, self._latest, self._numbers)

    @property
    def num_assignments(self) -> float:
        """Assignments of which as large a sample would be as uncertain as the expected shares are."""
        return float(self._numbers[_WEIGHT] * self._numbers[_LATEST] / (1 - again(self._numbers)) ** 2)


@compiled
def follow(counts: IntArray, popular: FloatArray, latest: FloatArray, numbers: FloatArray) -> None:
    """Take account of one more batch.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        popular: float64 ``[num_experts]``, sums of shares in batches like the latest; updated.
        latest: float64 ``[num_experts]``, shares of the latest batch; updated.
        numbers: float64 ``[4]``; updated.
    """
    shares = counts.sum(axis=0).astype(np.float64)
    total = shares.sum()
    if total == 0:
        return
    shares /= total
    if numbers[_WEIGHT] > 0:
        together = alone = 0.0
        for expert in range(len(shares)):
            mean = popular[expert] / numbers[_WEIGHT]
            together += (shares[expert] - mean) * (latest[expert] - mean)
            alone += (latest[expert] - mean) ** 2
        numbers[_TOGETHER] = _AGAIN_KEPT * numbers[_TOGETHER] + together
        numbers[_ALONE] = _AGAIN_KEPT * numbers[_ALONE] + alone
    weight = min(numbers[_WEIGHT] * numbers[_LATEST] / total, _MOST_BATCHES) * _POPULAR_KEPT
    if total >= _PROMPT_TIMES * numbers[_LATEST]:
        weight *= _PROMPT_KEPT
    for expert in range(len(shares)):
        mean = popular[expert] / numbers[_WEIGHT] if numbers[_WEIGHT] > 0 else 0.0
        popular[expert] = weight * mean + shares[expert]
        latest[expert] = shares[expert]
    numbers[_WEIGHT], numbers[_LATEST] = weight + 1, total


@compiled
def expected(popular: FloatArray, latest: FloatArray, numbers: FloatArray) -> FloatArray:
    """Return the shares that :meth:`Demand.expect` returns, from what :func:`follow` left."""
    weight, repeated = max(numbers[_WEIGHT], 1.0), again(numbers)
    shares: FloatArray = repeated * latest + (1 - repeated) / weight * popular
    return shares


@compiled
def again(numbers: FloatArray) -> float:
    """Return which part of the next batch is expected to be as the latest, from what :func:`follow` left."""
    if numbers[_ALONE] <= 0:
        return 0.0
    return float(min(max(numbers[_TOGETHER] / numbers[_ALONE], 0.0), _MOST_AGAIN))


@compiled
def hold_expected(
    shares: FloatArray,
    num_assignments: float,
    resident: BoolArray,
    fetched: BoolArray,
    at_home: BoolArray,
    num_slots: int,
    copies: IntArray,
) -> BoolArray:
    """Choose what ranks hold after a batch: the experts of their own that are expected to have most assignments.

    What was fetched is there, in the place of what is expected to be needed least. Then likelier experts take the
    places of others for as long as there are copies left, and where the difference is more than half a standard
    deviation.

    Args:
        shares: float64 ``[num_experts]``, expected shares of the next batch's assignments.
        num_assignments: how many they are derived from.
        resident: bool ``[num_experts, world_size]``, what ranks held before.
        fetched: bool ``[num_experts, world_size]``, what they fetched.
        at_home: bool ``[num_experts, world_size]``, what they may hold.
        num_slots: slots of a rank.
        copies: int64 ``[world_size]``, experts that every rank may copy in.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    held = resident & at_home
    order = np.argsort(-shares, kind="mergesort")
    for rank in range(resident.shape[1]):
        free = num_slots - held[:, rank].sum()
        for expert in order:
            if fetched[expert, rank] and at_home[expert, rank] and not held[expert, rank]:
                if free == 0:
                    held[_overwritten(order, held[:, rank], fetched[:, rank]), rank] = False
                held[expert, rank] = True
                free -= free > 0
        left = copies[rank]
        for expert in order:
            if left == 0:
                break
            if held[expert, rank] or not at_home[expert, rank]:
                continue
            if free == 0:
                least = _last(order, held[:, rank])
                deviation = np.sqrt((shares[expert] + shares[least]) / max(num_assignments, 1.0))
                if shares[expert] - shares[least] <= _LEAST_DEVIATIONS * deviation:
                    break
                held[least, rank] = False
            held[expert, rank] = True
            free -= free > 0
            left -= 1
    return held


@compiled
def _overwritten(order: IntArray, held: BoolArray, fetched: BoolArray) -> int:
    """Return which held expert a fetch overwrites: the last of ``order`` not fetched itself, else the first fetched."""
    kept = _last(order, held & ~fetched)
    return kept if kept >= 0 else order[np.argmax(held[order])]


@compiled
def _last(order: IntArray, among: BoolArray) -> int:
    """Return the last expert of ``order`` that is among some, -1 where none is."""
    for expert in order[::-1]:
        if among[expert]:
            return int(expert)
    return -1
