"""What a policy has seen of a layer: a sequence of all earlier batches that holds on to the latest ones only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import overload

from harmoeny.placement import IntArray


class History(Sequence[IntArray]):
    """The counts of earlier batches, oldest first, as long as there were batches; only the latest can be read.

    Its size in memory does not grow with the number of batches.
    """

    def __init__(self, window: int) -> None:
        """Begin empty; ``window``: the number of latest batches that can be read, at least 1."""
        self._latest: deque[IntArray] = deque(maxlen=window)
        self._num_batches = 0

    def append(self, counts: IntArray) -> None:
        """Add a batch, int64 ``[world_size, num_experts]``."""
        self._latest.append(counts)
        self._num_batches += 1

    def __len__(self) -> int:
        """Return the number of batches, those that can no longer be read too."""
        return self._num_batches

    @overload
    def __getitem__(self, index: int) -> IntArray: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[IntArray]: ...

    def __getitem__(self, index: int | slice) -> IntArray | Sequence[IntArray]:
        """Return a batch, or several.

        Raises:
            IndexError: there is no such batch, or it lies further back than the window.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num_batches))]
        batch = index + self._num_batches if index < 0 else index
        first_kept = self._num_batches - len(self._latest)
        if not 0 <= batch < self._num_batches:
            raise IndexError(f"batch {index} of {self._num_batches}")
        if batch < first_kept:
            raise IndexError(
                f"batch {index} of {self._num_batches} is no longer kept: Policy.history_window is {len(self._latest)}"
            )
        return self._latest[batch - first_kept]
