"""How fast batches are processed: one definition for those who write results and those who read them."""

from __future__ import annotations


def throughput_tokens_per_s(input_tokens: float, latency_s: float, drain_s: float) -> float:
    """Return input tokens per second of batches that follow one another, each once the one before left nothing behind.

    Copies that a batch leaves to its drain have to be made, too: a system that postpones them answers sooner, which the
    latency shows, and is not able to take more batches.

    Args:
        input_tokens: of the batch, on all ranks.
        latency_s: until its last rank has its first output token.
        drain_s: how much later its last copy is complete.
    """
    return input_tokens / (latency_s + drain_s)
