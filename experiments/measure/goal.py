"""How many rounds: as many as were asked for, or with ``until=`` as many as it takes for the ratios' intervals."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch.distributed as dist

from experiments.measure.bench import Bench, Rig
from experiments.measure.records import Records
from experiments.results.gather import on_rank_0
from harmoeny.runtime.layer.system import System
from results_schema.paired import ENOUGH_TO_AVERAGE, Ratio, mirrored_ratio
from results_schema.rates import throughput_tokens_per_s
from results_schema.yardstick import has_moved


@dataclass(frozen=True)
class Reached:
    """How the rounds ended that ``until=`` asked for.

    Attributes:
        asked: the share that intervals were to reach at most.
        rounds: rounds that were measured.
        reach: half the longest interval, relative to its ratio; None: there was no ratio.
        ended_by: ``until``, ``max_rounds`` or ``max_minutes``.
    """

    asked: float
    rounds: int
    reach: float | None
    ended_by: str

    @property
    def text(self) -> str:
        """Say it in a line."""
        reach = "there is no ratio" if self.reach is None else f"the longest interval reaches ±{self.reach:.1%}"
        why = "" if self.ended_by == "until" else f", ended by {self.ended_by}"
        return f"until={self.asked:g}: {reach} after {self.rounds} rounds{why}"


class Goal:
    """Says when rounds end; all ranks ask together.

    Attributes:
        benches: the points that are measured.
        reached: how they ended; None without ``until``.
    """

    def __init__(self, rig: Rig, benches: Sequence[Bench]) -> None:
        """Begin to count the time.

        Args:
            rig: of the group.
            benches: its points, which all have the same options.
        """
        self._rig, self.benches = rig, benches
        self._options, self._most = benches[0].point.options, benches[0].point.most_rounds
        self._until, self._so_far = self._options.until, ""
        self._begin_s = time.monotonic()
        self._seen = [_Seen() for _ in benches]
        self.reached: Reached | None = None

    def is_reached(self, num_rounds: int, records: Sequence[Records]) -> bool:
        """Tell whether no further round is needed, or possible, after ``num_rounds``."""
        if self._until is None:
            return num_rounds >= self._most
        least = min(max(self._options.rounds, ENOUGH_TO_AVERAGE), self._most)
        if num_rounds < least or (num_rounds % 2 and num_rounds < self._most):
            return False  # every second round completes two that mirror each other
        for seen, own in zip(self._seen, records, strict=True):
            seen.gather(own, self._rig)
        answer: list[Reached | None] = [self._judge(self._until, num_rounds) if self._rig.comm.rank == 0 else None]
        if self._rig.comm.world_size > 1:
            dist.broadcast_object_list(answer)
        self.reached = answer[0]
        return self.reached is not None

    def title(self, round_index: int) -> str:
        """Return what a round is called while it runs."""
        asked = self._options.rounds
        return f"round {round_index + 1}" + (f" of {asked}" if round_index < asked else self._so_far)

    def _judge(self, until: float, num_rounds: int) -> Reached | None:
        """Decide on rank 0; None: go on."""
        ratios = list(compared(self.benches, self._seen))
        reach = max((ratio.reach for ratio in ratios), default=None)
        self._so_far = "" if reach is None else f", ±{reach:.1%} so far (until={until:g})"
        minutes, limit = (time.monotonic() - self._begin_s) / 60, self._options.max_minutes
        for ended_by, is_over in (
            ("until", reach is not None and reach <= until),
            ("max_rounds", num_rounds >= self._most),
            ("max_minutes", limit is not None and minutes >= limit),
        ):
            if is_over:
                return Reached(until, num_rounds, reach, ended_by)
        return None


class _Seen:
    """What rank 0 knows of a point's rounds so far.

    Attributes:
        batches_per_s: by system and round, where batches follow one another.
        calm: by round, whether the machine stayed where it was.
    """

    def __init__(self) -> None:
        self.batches_per_s: dict[str, list[float]] = {}
        self.calm: list[bool] = []
        self._iterations = self._yardstick = 0

    def gather(self, records: Records, rig: Rig) -> None:
        """Bring what is new to rank 0; all ranks together."""
        own = (
            [(it.system, it.start_s, it.end_s, it.restoring_s) for it in records.iterations[self._iterations :]],
            [(one.product_s, one.copy_s) for one in records.yardstick[self._yardstick :]],
        )
        self._iterations, self._yardstick = len(records.iterations), len(records.yardstick)
        ranks = on_rank_0(own, rig.comm)
        for passes in zip(*(passes for passes, _ in ranks), strict=True):
            systems, *times = zip(*passes, strict=True)
            start_s, end_s, restoring_s = (max(of_ranks) for of_ranks in times)
            batches_per_s = throughput_tokens_per_s(1, end_s - start_s, restoring_s)
            self.batches_per_s.setdefault(systems[0], []).append(batches_per_s)
        moments = [
            (max(product_s for product_s, _ in of_ranks), max(copy_s for _, copy_s in of_ranks))
            for of_ranks in zip(*(taken for _, taken in ranks), strict=True)
        ]
        for before, after in zip(moments[::2], moments[1::2], strict=True):
            self.calm.append(not has_moved([before, after]))


def compared(benches: Sequence[Bench], seen: Sequence[_Seen]) -> Iterator[Ratio]:
    """Yield the ratios whose intervals shall be narrow.

    They are those of our systems to the best exact baseline of their point, or of all systems to the first where there
    is none of either, and of ours to the best exact system of the point without skew, if the group has one.
    """
    even = next((i for i, bench in enumerate(benches) if bench.point.labels().get("router.skew") == 0), None)
    for i, (bench, of_point) in enumerate(zip(benches, seen, strict=True)):
        ours = [system.name for system in bench.systems if not system.policy.baseline and not system.policy.bound]
        base = _fastest(of_point, [s for s in bench.systems if s.policy.baseline])
        if not ours or base is None:
            base, *ours = (system.name for system in bench.systems)
        yield from (_ratio(of_point, name, of_point, base) for name in ours)
        if even is not None and even != i and (best := _fastest(seen[even], benches[even].systems)) is not None:
            yield from (_ratio(of_point, name, seen[even], best) for name in ours)


def _fastest(seen: _Seen, systems: Sequence[System]) -> str | None:
    """Return the exact system, no bound, with the highest median throughput, as the report does."""
    candidates = [system.name for system in systems if system.policy.exact and not system.policy.bound]
    return max(candidates, key=lambda name: median(seen.batches_per_s[name]), default=None)


def _ratio(seen: _Seen, system: str, other: _Seen, base: str) -> Ratio:
    """Return the ratio of throughputs: every system has the same tokens in a round."""
    pairs = zip(seen.batches_per_s[system], other.batches_per_s[base], strict=True)
    calm = [one and two for one, two in zip(seen.calm, other.calm, strict=True)]
    return mirrored_ratio([own / of_base for own, of_base in pairs], calm)
