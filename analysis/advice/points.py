"""The points of a sweep that advice is made of, each with its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.advice.choose import Verdict, verdict
from analysis.advice.margin import Margin
from analysis.data.load import Run, Sweep

WHAT_IF, AS_RECORDED = "what_if", "as_recorded"


def cases_of(sweep: Sweep) -> list[str]:
    """Return what is different at every point.

    Raises:
        ValueError: no point is as recorded.
    """
    cases = [str(point.get(WHAT_IF, AS_RECORDED)) for point in sweep.points]
    if AS_RECORDED not in cases:
        raise ValueError(f"{WHAT_IF}: {', '.join(dict.fromkeys(cases))}, must have {AS_RECORDED} among its values")
    return cases


@dataclass(frozen=True)
class Points:
    """What a sweep found.

    Attributes:
        verdicts: of all points.
        runs: theirs.
        margin: what a gain has to exceed.
        num_missing: points that are not finished.
    """

    verdicts: Sequence[Verdict]
    runs: Sequence[Run]
    margin: Margin
    num_missing: int = 0

    @classmethod
    def of(cls, sweep: Sweep, margin: Margin) -> Points:
        """Judge all points of a sweep.

        Raises:
            ValueError: a run lacks what advice is made of, or no point is as recorded.
        """
        cases = cases_of(sweep)
        verdicts = [verdict(run, case, margin.relative) for run, case in zip(sweep.runs, cases, strict=True)]
        return cls(verdicts, sweep.runs, margin, len(sweep.missing))

    @property
    def run(self) -> Run:
        """The first run: what all have in common is read from it."""
        return self.runs[0]

    @property
    def sizes(self) -> list[Verdict]:
        """The verdicts of all sizes as recorded, with the memory that the sweep has first, by size."""
        recorded = [one for one in self.verdicts if one.what_if == AS_RECORDED]
        slots = recorded[0].spare_slots
        return sorted((one for one in recorded if one.spare_slots == slots), key=lambda one: one.tokens)

    @property
    def varied(self) -> list[Verdict]:
        """Those of the sizes of which something else was tried; the largest size where nothing was."""
        tried = {one.tokens for one in self.verdicts if one.what_if != AS_RECORDED}
        return [one for one in self.sizes if one.tokens in tried] or self.sizes[-1:]

    def phase(self, *, prefill: bool) -> list[Verdict]:
        """Return the sizes of prefill, or of decode."""
        return [one for one in self.sizes if one.is_prefill == prefill]

    def with_memory(self, tokens: int) -> list[Verdict]:
        """Return the verdicts on one size as recorded, by memory."""
        found = [one for one in self.verdicts if one.what_if == AS_RECORDED and one.tokens == tokens]
        return sorted(found, key=lambda one: one.spare_slots)

    def what_ifs(self, one: Verdict) -> list[Verdict]:
        """Return the verdicts on a size with its memory, as recorded first."""
        same = [v for v in self.verdicts if (v.tokens, v.spare_slots) == (one.tokens, one.spare_slots)]
        return sorted(same, key=lambda v: v.what_if != AS_RECORDED)

    def run_of(self, one: Verdict) -> Run:
        """Return the run that a verdict is on."""
        return next(run for run, other in zip(self.runs, self.verdicts, strict=True) if other is one)
