"""What to use where: systems that gain more than the numbers err by, and those that they cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.advice.gains import Gain, gains_of
from analysis.data.load import Run
from results_schema.advising import STATIC

#: Passes with fewer tokens per rank are decode steps.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Verdict:
    """What to use at one point.

    Attributes:
        tokens: tokens per rank of a pass.
        spare_slots: slots per rank and layer beside an even share of the experts.
        what_if: what is different from what was recorded and described; ``as_recorded``: nothing.
        gains: of all systems that fit, of every policy the best setting, the largest gain first.
        error: what a gain has to be above 1 by.
        out_of_memory: systems that do not fit.
    """

    tokens: int
    spare_slots: int
    what_if: str
    gains: Sequence[Gain]
    error: float
    out_of_memory: Sequence[str] = ()

    @property
    def paying(self) -> list[Gain]:
        """Systems whose gain is above 1 by more than the error, at the lower end of its interval, too."""
        return [gain for gain in self.gains if gain.low > 1 + self.error]

    @property
    def best(self) -> Gain | None:
        """The system to use; None: balancing does not pay, or nobody can tell."""
        return self.paying[0] if self.paying else None

    @property
    def equals(self) -> list[Gain]:
        """Further systems that pay, and are not behind the best by more than the error."""
        return [gain for gain in self.paying[1:] if gain.gain * (1 + self.error) >= self.paying[0].gain]

    def differs(self, other: Verdict) -> bool:
        """Tell whether another verdict is not to use what this one uses, nor what is as good for all one can tell."""
        if self.best is None or other.best is None:
            return self.best is not other.best
        return self.best.policy not in {gain.policy for gain in [other.best, *other.equals]}

    @property
    def is_prefill(self) -> bool:
        """Whether a pass is as long as those that read prompts."""
        return self.tokens >= PREFILL_TOKENS


def verdict(run: Run, what_if: str, error: float) -> Verdict:
    """Judge one run.

    Args:
        run: of the sweep.
        what_if: its value of that option.
        error: what a gain has to be above 1 by.
    """
    best: dict[str, Gain] = {}
    for gain in sorted(gains_of(run), key=lambda gain: -gain.gain):
        if gain.system != STATIC:
            best.setdefault(gain.policy, gain)
    return Verdict(
        tokens=int(run.config["batch_size"]) * int(run.config["seq_len"]),
        spare_slots=int(run.config["spare_slots"] or 0),
        what_if=what_if,
        gains=list(best.values()),
        error=error,
        out_of_memory=sorted(run.manifest.get("out_of_memory") or {}),
    )


@dataclass(frozen=True)
class Choice:
    """One system for a range of sizes.

    Attributes:
        gains: of the system, by tokens per rank; no size at which it does not pay.
        equals: policies that are in no size behind it by more than the error.
    """

    gains: dict[int, Gain]
    equals: list[Gain]

    @property
    def system(self) -> str:
        """Its name, at the largest size."""
        return self.gains[max(self.gains)].system


def choose(verdicts: Sequence[Verdict]) -> Choice | None:
    """Choose one policy for all sizes at which balancing pays; None where it pays at none.

    The policy that can be used at the most of them, and of those the one that gains most in all.

    Args:
        verdicts: one per size, of the same memory.
    """
    paying = [one for one in verdicts if one.best is not None]
    usable: dict[str, dict[int, Gain]] = {}
    for one in paying:
        for gain in [one.paying[0], *one.equals]:
            usable.setdefault(gain.policy, {})[one.tokens] = gain
    if not usable:
        return None

    def worth(policy: str) -> tuple[int, float]:
        total = 1.0
        for gain in usable[policy].values():
            total *= gain.gain
        return len(usable[policy]), total

    ranked = sorted(usable, key=worth, reverse=True)
    chosen = usable[ranked[0]]
    equals = [usable[policy][max(chosen)] for policy in ranked[1:] if usable[policy].keys() >= chosen.keys()]
    return Choice(dict(sorted(chosen.items())), equals)
