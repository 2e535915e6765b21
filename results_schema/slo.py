"""When a request is good: goodput counts those that keep all limits (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping

#: What may be limited, by option of ``slo`` and column or formula of requests.
LIMITS = ("ttft_s", "tpot_s", "e2e_s")


def keeps_limits(limits: Mapping[str, float], *, ttft_s: float, tpot_s: float, decode_s: float) -> bool:
    """Tell whether a request keeps all limits.

    Args:
        limits: seconds, by names of :data:`LIMITS`; what is not named is not limited.
        ttft_s: from its arrival to its first token.
        tpot_s: per token after the first; 0 where there is none.
        decode_s: from its first token to its last.
    """
    taken = {"ttft_s": ttft_s, "tpot_s": tpot_s, "e2e_s": ttft_s + decode_s}
    return all(taken[name] <= limit for name, limit in limits.items())
