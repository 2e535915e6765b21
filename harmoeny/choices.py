"""The names that a policy's options choose from, spelled once for the policy, which checks them, and the runtime."""

from __future__ import annotations

from enum import StrEnum


class Fetch(StrEnum):
    """How a rank gets at weights that it does not hold; harmoeny/runtime/memory/fetch has one file each."""

    NONE = "none"
    SYNC = "sync"
    ASYNC = "async"
    PEER = "peer"


class WorkOrder(StrEnum):
    """When a rank executes fetched experts; :func:`harmoeny.runtime.memory.schedule.make_schedule` explains them."""

    COVERED = "covered"
    PAPER = "paper"


class KernelName(StrEnum):
    """What computes experts; :func:`harmoeny.runtime.kernels.make_kernel` explains them."""

    AUTO = "auto"
    LOOP = "loop"
    GROUPED_MM = "grouped_mm"
    TRITON = "triton"


class Exchange(StrEnum):
    """How tokens and peers' weights travel between ranks: by themselves or, with ``auto``, as it can be done here."""

    AUTO = "auto"
    COLLECTIVE = "collective"
    PUT = "put"


class Knowledge(StrEnum):
    """What a policy may see of the routing: of earlier batches, of a prediction made before the gate, of the batch."""

    HISTORY = "history"
    LOOKAHEAD = "lookahead"
    EXACT = "exact"


#: The executor that carries out any plan: dispatch, then the experts, then combine.
PLAN_EXECUTOR = "plan"
