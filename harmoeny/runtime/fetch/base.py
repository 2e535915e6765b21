"""The interface of a fetch strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harmoeny.placement import BoolArray
from harmoeny.runtime.experts import ExpertStore

#: Executes one expert's slice of the batch with the weights given.
Execute = Callable[["ExpertWork", Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class ExpertWork:
    """One expert's slice of the rows that a rank executes.

    Attributes:
        expert_id: the expert.
        start: first row of the slice.
        num_tokens: rows in the slice, at least 1.
    """

    expert_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True)
class FetchStats:
    """What moving weights cost in one layer on one rank.

    Attributes:
        num_fetches: experts fetched.
        fetch_bytes: their size.
        fetch_s: time spent copying.
        fetch_wait_s: part of it during which computation stood still.
    """

    num_fetches: int = 0
    fetch_bytes: int = 0
    fetch_s: float = 0.0
    fetch_wait_s: float = 0.0


class FetchStrategy(ABC):
    """Gets weights to where they are needed and thereby decides the order in which a rank's experts are executed.

    One object serves one system on one rank: its slots are that system's device memory.
    """

    name: ClassVar[str]

    def __init__(self, store: ExpertStore, resident: BoolArray, device: torch.device) -> None:
        """Load the resident experts.

        Args:
            store: all experts, in host memory.
            resident: bool ``[num_experts]``, the experts that this rank holds, the same in every layer.
            device: where experts are executed.
        """
        self.store = store
        self.resident = resident
        self.device = device

    @abstractmethod
    def run(self, layer: int, work: Sequence[ExpertWork], execute: Execute) -> FetchStats:
        """Call ``execute`` once for every item of ``work``, in an order of the strategy's choice.

        The weights handed to ``execute`` stay valid until it returns (on CUDA: for the work it queued).
        """
