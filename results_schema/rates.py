"""How fast batches are processed: one definition for those who write results and those who read them."""

from __future__ import annotations


def throughput_tokens_per_s(input_tokens: float, latency_s: float, restoring_s: float) -> float:
    """Return input tokens per second of batches that follow one another.

    Residents that a batch overwrites are copied back behind the next one, if these copies take no longer than that. A
    system that postpones more answers sooner, which the latency shows, but is not able to take more batches.

    Args:
        input_tokens: of the batch, on all ranks.
        latency_s: until its last rank has its first output token.
        restoring_s: how long the link of the busiest rank's host is busy with copying residents back.
    """
    return input_tokens / max(latency_s, restoring_s)
