"""The page of advice: what to do in a sentence, then what it gains, costs, needs and depends on, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.advice.choose import Choice, Verdict, choose
from analysis.advice.document import Document
from analysis.advice.getting import getting
from analysis.advice.parts import export, limits, memory, rebalancing, sensitivity, sureness, where
from analysis.advice.points import Points
from analysis.advice.texts import NOTHING, badges, gain_text, model_text, names, scope_text, span
from analysis.data.pairing import MANY_MOVED, moved_rounds
from analysis.present.style import label
from results_schema.yardstick import MOVED

Choices = Mapping[str, Choice | None]


def document(points: Points, folder: Path) -> Document:
    """Return the page.

    Args:
        points: of a sweep.
        folder: whose ``figures`` its picture goes to.
    """
    manifest = points.run.manifest
    choices = {phase: choose(found) for phase in _PHASES if (found := points.phase(prefill=phase == "prefill"))}
    used = [choice for choice in choices.values() if choice is not None]
    advised = [gain for choice in used for gain in [choice.gains[max(choice.gains)], *choice.equals]]
    return Document(
        title=f"Which system for {model_text(points.run)} on {manifest['world_size']} ranks of {manifest['device']}?",
        badges=badges(points.run),
        lead=[_sentence(points, phase, choice) for phase, choice in choices.items()],
        bullets=_remarks(points, choices),
        parts=[
            where(points, folder),
            *getting(points.run_of(points.sizes[-1]), list(dict.fromkeys(gain.system for gain in advised))),
            memory(points),
            rebalancing(points),
            sensitivity(points),
            *limits(points),
            export(points, [gain.policy for gain in advised]),
            sureness(points),
        ],
    )


_PHASES = ("decode", "prefill")


def _sentence(points: Points, phase: str, choice: Choice | None) -> str:
    """Say what to do in a phase."""
    found = points.phase(prefill=phase == "prefill")
    sizes = [one.tokens for one in found]
    if choice is None:
        return f"{phase.capitalize()}, {span(sizes)}: {NOTHING}; {why_nothing(found)}."
    gains = [gain.gain for gain in choice.gains.values()]
    least, most = f"{min(gains):.2f}", f"{max(gains):.2f}"
    text = (
        f"{phase.capitalize()}, {_span(choice, sizes)}: use {label(choice.system)}, "
        f"{least if least == most else f'{least} to {most}'} times the throughput of static EP{scope_text(points.run)}."
    )
    rest = [one for one in found if one.tokens not in choice.gains]
    return " ".join([text, *(f"At {one.tokens:,}: {_elsewhere(one)}." for one in rest)])


def _span(choice: Choice, sizes: Sequence[int]) -> str:
    """Write the sizes that a system is chosen for; where it is so for all from one on, that one."""
    chosen = list(choice.gains)
    if len(chosen) > 1 and chosen[0] > sizes[0] and chosen == list(sizes[-len(chosen) :]):
        return f"from {chosen[0]:,} tokens per rank on ({chosen[-1]:,} at most were run)"
    return span(chosen)


def why_nothing(found: Sequence[Verdict]) -> str:
    """Tell sizes at which no system can gain enough from those at which nobody knows."""
    open_ones = [one.gains[0] for one in found if one.gains and one.gains[0].high > 1 + one.error]
    if not open_ones:
        return "balancing does not pay"
    widest = max(open_ones, key=lambda gain: gain.gain)
    return f"no gain is certain (the largest: {label(widest.system)} {gain_text(widest)})"


def _elsewhere(one: Verdict) -> str:
    """Say what to do at a size at which the system that is used elsewhere does not pay."""
    return NOTHING if one.best is None else f"{label(one.best.system)}, {one.best.gain:.2f} times"


def _remarks(points: Points, choices: Choices) -> list[str]:
    """Return what else to know first."""
    margin = points.margin
    remarks = ["Static EP: every expert is executed where it lives, and nothing is balanced."]
    if points.run.manifest["scope"] != "model":
        remarks.append(
            "A whole model gains less, by the share of its time that its MoE layers take (model= runs whole ones)."
        )
    remarks += [
        f"{phase.capitalize()}: as good, for all that can be told: {names(choice.equals)}."
        for phase, choice in choices.items()
        if choice is not None and choice.equals
    ]
    remarks.append(
        f"A gain counts from {1 + margin.relative:.2f} on, at the lower end of its interval: {margin.reason}."
    )
    remarks += _unrest(points)
    if points.num_missing:
        remarks.append(f"Not in here: {points.num_missing} points of the sweep that are not finished.")
    return remarks


def _unrest(points: Points) -> list[str]:
    """Say that the machine was not quiet while it was measured."""
    moved = sum(len(moved_rounds(run)) for run in points.runs)
    rounds = sum(run.iterations["round"].nunique() for run in points.runs)
    if moved <= MANY_MOVED * rounds:
        return []
    return [f"The machine was not quiet: it moved by over {MOVED:.0%} in {moved} of {rounds} rounds. Measure again."]
