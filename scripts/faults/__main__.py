"""Plant faults at random moments of a small sweep and check what must hold after each.

Every round has a seed, which chooses the fault in turn and its moment at random. After the fault no process, shared
memory or temporary file of the run may be left, points that were finished are as they were, one line names the cause,
and no manifest says that a run is going on. Then the same command has to complete the sweep, and every number of its
summaries is computed once more from the raw rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from results_schema.printing import print_anything
from scripts.faults.fault import FAULTS
from scripts.faults.round import Outcome, Rounds
from tests.programs import Programs


def campaign(
    seed: int, *, rounds: int | None, minutes: float | None, folder: Path, programs: Programs | None = None
) -> Iterator[Outcome]:
    """Play rounds with consecutive seeds until there were enough, or the time is up.

    Args:
        seed: of the first round.
        rounds: how many; None: as many as the time allows.
        minutes: no round begins later; None: no limit.
        folder: for all files.
        programs: starts the sweeps without the seconds of imports; None: interpreters, as users start them.
    """
    until_s = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    player, played = Rounds(folder, programs), 0
    while (rounds is None or played < rounds) and time.monotonic() < until_s:
        yield player.play(seed + played)
        played += 1


def describe(outcome: Outcome, folder: Path) -> str:
    """Return a round in words: one line, and of a failed one what did not hold and how to repeat it."""
    if outcome.skipped:
        return f"seed {outcome.seed}: {outcome.fault}: skipped: {outcome.skipped}"
    state = "FAILED" if outcome.problems else "holds" if outcome.struck else "holds (came too late)"
    lines = [f"seed {outcome.seed}: {outcome.fault}: {state} in {outcome.took_s:.0f} s: {outcome.what}"]
    lines += [f"    {problem}" for problem in outcome.problems]
    if outcome.problems:
        lines.append(f"    kept in {folder / f'round-{outcome.seed}'}")
        lines.append(f"    again: python -m scripts.faults --rounds 1 --seed {outcome.seed}")
    return "\n".join(lines)


def totals(outcomes: Sequence[Outcome]) -> str:
    """Return a table in Markdown: by fault its rounds, and how many of them struck, failed or were skipped."""
    lines = ["| fault | rounds | struck | failed | skipped |", "| --- | --- | --- | --- | --- |"]
    for fault in FAULTS:
        own = [outcome for outcome in outcomes if outcome.fault == fault.name]
        numbers = (
            len(own),
            sum(o.struck for o in own),
            sum(bool(o.problems) for o in own),
            sum(bool(o.skipped) for o in own),
        )
        lines.append(f"| {fault.name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main() -> None:
    """Play a campaign and report; the exit status is 1 where something did not hold."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.faults",
        description=__doc__,
        epilog=f"faults, in turn by seed: {', '.join(fault.name for fault in FAULTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, help="no round begins later")
    parser.add_argument("--rounds", type=int, help=f"how many; default: each fault once ({len(FAULTS)})")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones count on (default: 0)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if rounds is None and arguments.minutes is None:
        rounds = len(FAULTS)
    folder = Path(tempfile.mkdtemp(prefix="harmoeny-faults-"))
    outcomes = []
    for outcome in campaign(arguments.seed, rounds=rounds, minutes=arguments.minutes, folder=folder):
        outcomes.append(outcome)
        print(describe(outcome, folder), flush=True)
    print(totals(outcomes))
    failed = [str(outcome.seed) for outcome in outcomes if outcome.problems]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(outcomes)} rounds failed: seeds {', '.join(failed)}; see {folder}")


if __name__ == "__main__":
    main()
