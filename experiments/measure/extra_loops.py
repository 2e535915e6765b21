"""What a run measures beside the closed loop, if asked: an open loop of requests, and a decode phase."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.measure.bench import Bench
from experiments.measure.decode import decode_rounds, make_decode_batch
from experiments.measure.serving import serve_rates
from experiments.point.point import Point
from experiments.results.request_rows import Decoded, Served


@dataclass(frozen=True)
class Extra:
    """What one rank saw.

    Attributes:
        served: requests of the open loop.
        decoded: batches of the decode phase.
    """

    served: list[Served] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)


def num_extra_passes(point: Point) -> int:
    """Return how often the extra loops advance the progress."""
    num_loops = int(point.options.requests.open_loop) + int(point.options.decode_tokens > 0)
    return num_loops * len(point.systems) * point.options.rounds


def measure_extra_loops(bench: Bench) -> Extra:
    """Measure what the point asks for; all ranks together, all systems interleaved on the same requests."""
    extra = Extra()
    if bench.point.options.requests.open_loop:
        extra.served.extend(serve_rates(bench))
    if num_steps := bench.point.options.decode_tokens:
        bench.progress.say("decoding with the dense model")
        prompts = [make_decode_batch(bench, batch, i, num_steps) for i, batch in enumerate(bench.batches)]
        extra.decoded.extend(decode_rounds(bench, prompts))
    return extra
