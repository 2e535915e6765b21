"""The sweep that faults are planted in: two points of a tiny model, with folders of its own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from results_schema.files import SUMMARY, SWEEPS
from results_schema.manifest import Status, read_manifest
from results_schema.tables import TABLES
from tests.experiments.command import Command
from tests.programs import Programs

BACKENDS: dict[str, tuple[str, ...]] = {"ranks": (), "simulator": ("backend=simulator", "hardware=dgx1_v100")}
SKEWS = (0.0, 0.9)
SYSTEMS = ("static_ep", "harmoeny")
ROUNDS = 2
_OPTIONS = (
    "experiment=smoke", f"system=[{','.join(SYSTEMS)}]", "batch_size=1", "seq_len=16",
    "+systems.harmoeny.costs={fetch_s:1e-6,peer_fetch_s:1e-6}",
    f"router.skew={','.join(map(str, SKEWS))}", f"rounds={ROUNDS}", "warmup_rounds=0", "dataset=local",
    "dataset.path=README.md", "wandb.mode=disabled",
)  # fmt: skip

#: Of a finished point, what nobody may change any more.
KEPT = ("manifest.json", "config.yaml", SUMMARY, *(table.file for table in TABLES))


class TinySweep:
    """The same command every time, whatever happens to it; a process of it is found by its environment.

    Attributes:
        backend: ``ranks`` or ``simulator``.
        folder: for everything that the sweep writes.
        results, cache, temporary: the folders of its results, prepared data and temporary files.
        programs: starts it without the seconds of imports where nothing is to be around the interpreter; None: never.
    """

    def __init__(self, folder: Path, backend: str, programs: Programs | None = None) -> None:
        self.backend, self.folder, self.programs = backend, folder, programs
        self.results, self.cache, self.temporary = (folder / name for name in ("results", "cache", "temporary"))
        for path in (self.results, self.cache, self.temporary):
            path.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        *options: str,
        launcher: Sequence[str] = (),
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Command:
        """Start the sweep, with further ``options``, as a module of ``launcher`` where there is one."""
        own = {"HARMOENY_CACHE": str(self.cache), "TMPDIR": str(self.temporary)} | dict(variables or {})
        arguments = (*_OPTIONS, *BACKENDS[self.backend], f"results_dir={self.results}", *options)
        programs = None if prefix or variables else self.programs
        return Command(self.folder, *launcher, "run.py", *arguments, prefix=prefix, variables=own, programs=programs)

    def begin_from(self, reference: TinySweep, missing: Sequence[int]) -> None:
        """Take over what another sweep finished, but the points of the given numbers."""
        for own, other in ((self.results, reference.results), (self.cache, reference.cache)):
            shutil.copytree(other, own, dirs_exist_ok=True)
        for index in missing:
            shutil.rmtree(self.points()[SKEWS[index]])

    def points(self) -> dict[float, Path]:
        """Return the folders of the points that there are, by skew."""
        found = {}
        for path in self.results.glob("smoke/*"):
            if path.is_dir() and path.name != SWEEPS:
                found[next(skew for skew in SKEWS if f"skew={skew}-" in path.name)] = path
        return found

    def manifests(self) -> dict[float, dict[str, Any]]:
        """Return the manifests that can be read, by skew."""
        found = {}
        for skew, folder in self.points().items():
            try:
                found[skew] = read_manifest(folder)
            except ValueError:
                continue
        return found

    def finished(self) -> dict[str, str]:
        """Return the files of all finished points that nobody may change any more, each with its digest."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for skew, manifest in self.manifests().items()
            if manifest["status"] == Status.FINISHED
            for path in (self.points()[skew] / name for name in KEPT)
            if path.exists()
        }

    @property
    def is_complete(self) -> bool:
        """Whether all points are finished."""
        return [manifest["status"] for manifest in self.manifests().values()] == [Status.FINISHED] * len(SKEWS)


def ranks_of(command: Command) -> list[int]:
    """Return the process ids of the ranks that live now: the children of the launcher's fork server, in order."""
    try:
        started = psutil.Process(command.pid).children(recursive=True)
        return sorted(process.pid for process in started if process.ppid() != command.pid)
    except psutil.Error:
        return []  # the launcher ended meanwhile, or one of them


def reference(folder: Path, backend: str, programs: Programs | None) -> TinySweep:
    """Run the sweep once without any fault.

    Raises:
        AssertionError: it does not work even so.
    """
    sweep = TinySweep(folder, backend, programs)
    with sweep.start() as command:
        status = command.wait(300)
        assert status == 0, command.output()
    assert sweep.is_complete, command.output()
    return sweep
