"""One round: a sweep of which a part is finished, a fault, the checks, a second start, the checks of that."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from results_schema.tables import TABLES
from scripts.faults import clock, disk, link, processes, torn  # noqa: F401  (they register their faults)
from scripts.faults.checks import after_fault, after_resume, left_in_memory, shared_memory
from scripts.faults.fault import FAULTS, Fault, NotHereError, end
from scripts.faults.sweep import TinySweep, reference
from tests.programs import Programs


@dataclass
class Outcome:
    """What a round showed.

    Attributes:
        seed: of the round.
        fault: name of the fault.
        what: the fault with its choices, in words.
        struck: whether there was something left to strike.
        took_s: how long the round took.
        skipped: why the fault cannot be planted here; empty: it can.
        problems: what did not hold.
    """

    seed: int
    fault: str
    what: str = ""
    struck: bool = False
    took_s: float = 0.0
    skipped: str = ""
    problems: list[str] = field(default_factory=list)


class Rounds:
    """Plays rounds in a folder; what all share is made when it is needed."""

    def __init__(self, folder: Path, programs: Programs | None = None) -> None:
        self._folder, self._programs = folder, programs
        self._references: dict[str, TinySweep] = {}

    def play(self, seed: int) -> Outcome:
        """Play the round of a seed, which chooses the fault in turn and everything else at random.

        Its folder is removed unless something did not hold.
        """
        rng, fault = Random(seed), FAULTS[seed % len(FAULTS)]  # noqa: S311  (no secret)
        outcome = Outcome(seed, fault.name)
        begin_s = time.monotonic()
        folder = self._folder / f"round-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._play(rng, fault, folder, outcome)
        except NotHereError as reason:
            outcome.skipped = str(reason)
        except AssertionError as error:
            outcome.problems.append(str(error))
        outcome.took_s = time.monotonic() - begin_s
        if not outcome.problems:
            shutil.rmtree(folder)
        return outcome

    def _play(self, rng: Random, fault: Fault, folder: Path, outcome: Outcome) -> None:
        sweep = TinySweep(folder, rng.choice(fault.backends), self._programs)
        finished = self._reference(sweep.backend)
        sweep.begin_from(finished, fault.missing(rng))
        memory = shared_memory()
        planted = fault.plant(sweep, rng)
        outcome.what, outcome.struck = f"{planted.what} ({sweep.backend})", planted.struck
        outcome.problems += after_fault(sweep, planted)
        outcome.problems += left_in_memory(memory)
        outcome.problems += _trusted(sweep, finished)
        resumed = []
        if not sweep.is_complete or any(ended.status for ended in planted.ended):
            with sweep.start() as command:
                resumed.append(end(command))
        outcome.problems += after_resume(sweep, planted, resumed, finished)
        outcome.problems += left_in_memory(memory)

    def _reference(self, backend: str) -> TinySweep:
        if backend not in self._references:
            self._references[backend] = reference(self._folder / f"reference-{backend}", backend, self._programs)
        return self._references[backend]


def _trusted(sweep: TinySweep, finished: TinySweep) -> list[str]:
    """Return the tables of kept points that are not as they were written."""
    kept = [
        skew
        for skew, manifest in sweep.manifests().items()
        if manifest.get("started_at") == finished.manifests()[skew]["started_at"]
        and manifest["status"] == finished.manifests()[skew]["status"]
    ]
    pairs = [(sweep.points()[s] / t.file, finished.points()[s] / t.file) for s in kept for t in TABLES]
    return [
        f"{own} was taken for whole"
        for own, written in pairs
        if own.exists() != written.exists() or (own.exists() and own.read_bytes() != written.read_bytes())
    ]
