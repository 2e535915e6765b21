"""What a rank keeps in device memory, so that a configuration that does not fit gives no number."""

from __future__ import annotations

from experiments.results.run_folder import RunError
from experiments.routers.base import FloatArray
from experiments.simulator.model_work import ModelWork
from harmoeny.placement import IntArray


class OutOfMemoryError(RunError):
    """A rank needs more device memory than there is; the message says which, and how much."""


def check_memory(needed: FloatArray, limit: float | None, where: str) -> None:
    """Refuse what does not fit.

    Args:
        needed: float64 ``[world_size]``, bytes.
        limit: bytes of one device; None: no limit.
        where: part of the message.

    Raises:
        OutOfMemoryError: some rank needs more than the limit.
    """
    if limit is not None and needed.max() > limit:
        rank = int(needed.argmax())
        raise OutOfMemoryError(
            f"rank {rank} needs {needed[rank] / 2**30:.3g} GiB of {limit / 2**30:.3g} GiB device memory in {where}"
        )


def layer_bytes(work: ModelWork, sent: FloatArray, executed: IntArray) -> FloatArray:
    """Return what a MoE layer takes for the time of its execution.

    The rows that a rank sends; those that it executes, three times (received, grouped by expert, results); and for its
    largest slice what is between the matrices of an expert, before and after the activation.

    Args:
        work: the model.
        sent: float64 ``[world_size]``, rows that leave a rank, those for itself too.
        executed: int64 ``[num_experts, world_size]``.
    """
    rows = sent + 3.0 * executed.sum(axis=0)
    between = 2.0 * executed.max(axis=0) * work.inner_width * work.element_bytes
    needed: FloatArray = rows * work.row_bytes + between
    return needed


def mask_bytes(work: ModelWork, num_tokens: int, capacity: int) -> float:
    """Return the two matrices ``[tokens, experts, capacity]`` of a padding system, one to dispatch, one to combine."""
    return 2.0 * num_tokens * work.num_experts * capacity * work.element_bytes
