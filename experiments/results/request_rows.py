"""From requests and decoded batches to the rows of the result schema (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from experiments.results.layer_rows import Platform, RankIteration
from results_schema.slo import keeps_limits
from results_schema.tables import DECODE

#: Columns of layers that the decode phase has the sums of, over its steps, MoE layers and ranks.
DECODE_TOTALS = tuple(column.name for column in DECODE.columns if column.added is not None)


def decode_totals(layers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the sums of :data:`DECODE_TOTALS` over rows of layers."""
    totals = dict.fromkeys(DECODE_TOTALS, 0.0)
    for layer in layers:
        for name in DECODE_TOTALS:
            totals[name] += layer[name]
    return totals


@dataclass(frozen=True)
class Served:
    """One request; times are seconds since the first request of the round could have arrived.

    Attributes:
        system: the system that served it.
        round: round of interleaved systems.
        batch: batch of the round that it was served in.
        request: its number in the order of arrival.
        rank: the rank that served it.
        input_tokens: its length.
        arrival_s: when it arrived.
        start_s: when its batch began.
        first_token_s: when its first token was out.
        later_s: when its further tokens were out, ascending.
        rate_per_s: requests that arrived per second on average; 0 where no such rate was asked for.
    """

    system: str
    round: int
    batch: int
    request: int
    rank: int
    input_tokens: int
    arrival_s: float
    start_s: float
    first_token_s: float
    later_s: Sequence[float] = ()
    rate_per_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def decode_s(self) -> float:
        """Time from the first token to the last."""
        return self.later_s[-1] - self.first_token_s if self.later_s else 0.0

    @property
    def tpot_s(self) -> float:
        """Time per token after the first; 0 where there is none."""
        return self.decode_s / len(self.later_s) if self.later_s else 0.0

    def row(self, loop: str) -> dict[str, Any]:
        """Return the columns of ``requests.parquet`` but those of the platform."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "later_s"}
        return values | {
            "loop": loop,
            "queue_s": self.start_s - self.arrival_s,
            "ttft_s": self.ttft_s,
            "output_tokens": 1 + len(self.later_s),
            "decode_s": self.decode_s,
            "tpot_s": self.tpot_s,
            "itl_s": np.diff([self.first_token_s, *self.later_s]),
        }


def num_good(served: Iterable[Served], system: str, limits: Mapping[str, float]) -> int:
    """Return how many of a system's requests keep all limits."""
    return sum(
        keeps_limits(limits, ttft_s=one.ttft_s, tpot_s=one.tpot_s, decode_s=one.decode_s)
        for one in served
        if one.system == system
    )


@dataclass(frozen=True)
class Decoded:
    """One measured batch as one rank saw it; times are seconds on the common clock.

    Attributes:
        system: the system.
        round: round of interleaved systems.
        rank: the rank.
        num_sequences: its sequences.
        num_steps: tokens after the first, per sequence.
        first_token_s: when it had its first tokens.
        last_token_s: when it had its last tokens.
        totals: sums over its MoE layers, by the names in :data:`DECODE_TOTALS`.
    """

    system: str
    round: int
    rank: int
    num_sequences: int
    num_steps: int
    first_token_s: float
    last_token_s: float
    totals: Mapping[str, float]


def request_frame(iterations: Sequence[RankIteration], served: Sequence[Served], platform: Platform) -> pd.DataFrame:
    """Return the rows of ``requests.parquet``: the closed loop's sequences, then the open loop's requests."""
    begins: dict[int, float] = {}
    for it in iterations:
        begins[it.iteration] = max(begins.get(it.iteration, it.start_s), it.start_s)
    numbers: dict[int, int] = {}
    rows = []
    for it in sorted(iterations, key=lambda i: (i.iteration, i.rank)):
        for _ in range(it.num_sequences):
            number = numbers[it.iteration] = numbers.get(it.iteration, -1) + 1
            rows.append(
                Served(
                    system=it.system,
                    round=it.round,
                    batch=0,
                    request=number,
                    rank=it.rank,
                    input_tokens=it.input_tokens // it.num_sequences,
                    arrival_s=0.0,
                    start_s=0.0,
                    first_token_s=it.end_s - begins[it.iteration],
                )
            )
    in_order = sorted(served, key=lambda one: (one.rate_per_s, one.round, one.system, one.request))
    frame = pd.DataFrame([row.row("closed") for row in rows] + [row.row("open") for row in in_order])
    return frame.assign(**asdict(platform))


def decode_frame(decoded: Sequence[Decoded], platform: Platform) -> pd.DataFrame:
    """Return the rows of ``decode.parquet``."""
    groups: dict[tuple[int, str], list[Decoded]] = {}
    for rank in decoded:
        groups.setdefault((rank.round, rank.system), []).append(rank)
    rows = []
    for (round_index, system), ranks in sorted(groups.items()):
        num_sequences = sum(r.num_sequences for r in ranks)
        steps = ranks[0].num_steps
        decode_s = max(r.last_token_s for r in ranks) - max(r.first_token_s for r in ranks)
        per_sequence = sum((r.last_token_s - r.first_token_s) * r.num_sequences for r in ranks) / num_sequences
        rows.append(
            {
                "system": system,
                "round": round_index,
                **asdict(platform),
                "world_size": len(ranks),
                "num_sequences": num_sequences,
                "output_tokens": num_sequences * steps,
                "decode_s": decode_s,
                "tpot_s": per_sequence / steps,
                "output_tokens_per_s": num_sequences * steps / decode_s,
                **{name: sum(r.totals[name] for r in ranks) for name in DECODE_TOTALS},
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({column.name: column.dtype for column in DECODE.columns if column.name in DECODE_TOTALS})
