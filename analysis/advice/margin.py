"""How far a gain can be off without anybody knowing: what a gain has to exceed before it is advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.advice.error import FOLDER, ValidatedError, validated_error
from analysis.data.load import Run
from analysis.data.twins import twins_of
from analysis.present.style import label
from results_schema.advising import STATIC


@dataclass(frozen=True)
class Margin:
    """The least gain that counts, and why.

    Attributes:
        relative: what a gain has to be above 1 by.
        name: whose error it is.
        reason: why it is so much; the end of a sentence.
        details: what else to know of it, as sentences.
    """

    relative: float
    name: str
    reason: str
    details: Sequence[str] = ()


def margin_of(runs: Sequence[Run], validation: Path = FOLDER) -> Margin:
    """Return the margin of runs that are all simulated, or all measured.

    Args:
        runs: at least one.
        validation: where the simulator's validation is.

    Raises:
        ValueError: some are simulated and some are not, or the validation is missing or damaged.
    """
    if len({run.simulated for run in runs}) > 1:
        raise ValueError("backend: ranks and simulator, must be the same for all points that advice is made of")
    if runs[0].simulated:
        return simulated_margin(validated_error(str(runs[0].manifest["device"]), validation))
    return measured_margin(runs)


def simulated_margin(error: ValidatedError) -> Margin:
    """Return the margin of predictions: the simulator's error of gains, in the median."""
    other = " This machine is another one, of which nothing was measured." if error.is_other else ""
    return Margin(
        relative=error.median,
        name="the simulator's error",
        reason=f"predicted gains were wrong by {error.median:.0%} (median of {error.points}) where they could be "
        f"compared, on {error.machine}",
        details=[
            f"Predicted gains were compared with measured or published ones on {error.machine}: median error "
            f"{error.median:.0%} of {error.points} (results/validation).{other}"
        ],
    )


def measured_margin(runs: Sequence[Run]) -> Margin:
    """Return the margin of measurements: how far static EP under another name came out from static EP, at most."""
    name = "the measurement's own error"
    twins = [pair for pair in twins_of(runs) if STATIC in (pair.one, pair.other)]
    if not twins:
        return Margin(
            0.0, name, "nothing says how far two measurements of the same would differ: add fastmoe to system="
        )
    relative = max(abs(ratio.median - 1) for pair in twins for ratio in pair.ratios)
    points = max(len(pair.ratios) for pair in twins)
    others = ", ".join(label(pair.other if pair.one == STATIC else pair.one) for pair in twins)
    return Margin(
        relative,
        name,
        f"two systems that do the same, static EP and {others}, came out up to {relative:.1%} apart ({points} points)",
    )
