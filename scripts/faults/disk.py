"""Disks that are full or may not be written: small ones in a mount namespace, and folders without permission."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from random import Random

from results_schema.files import SWEEPS
from scripts.faults.fault import Fault, NotHereError, Planted, end, fault, moment
from scripts.faults.sweep import SKEWS, TinySweep

#: What a small file system gets, then the command, then what is left of it, since the mount goes with the namespace.
_SMALL = (
    'mount -t tmpfs -o "$1" tmpfs "$2" && cp -r "$3/." "$2" || exit 99; shift 3; '
    '"$@"; status=$?; mkdir "$LEFT" && cp -r "$SMALL/." "$LEFT"; exit $status'
)
_NO_ROOM = r"No space left on device"


def _require(*command: str) -> None:
    """Raise NotHereError where a command does not work here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except OSError as error:
        raise NotHereError(f"no {command[0]} here") from error
    if done.returncode:
        raise NotHereError(f"`{' '.join(command)}` is not allowed here: {done.stderr.strip()}")


class _Full(Fault):
    """A folder on a file system whose room runs out at some moment, or at once."""

    folder = "results"
    most_bytes = 200_000
    errors: tuple[str, ...] = ()

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Run the sweep with the folder on a small disk; afterwards what was on it has a large one."""
        _require("unshare", "-m", "true")
        folder, kept, left = (sweep.folder / name for name in (self.folder, "kept", "left"))
        shutil.copytree(folder, kept)
        limit = self.limit(list(kept.rglob("*")), rng)
        planted = Planted(f"{self.folder} on a disk with {limit}", statuses=(1, 2), errors=self.errors)
        planted.before = sweep.finished()
        prefix = ("unshare", "-m", "bash", "-c", _SMALL, "bash", limit, str(folder), str(kept))
        with sweep.start(prefix=prefix, variables={"LEFT": str(left), "SMALL": str(folder)}) as command:
            planted.ended.append(end(command))
        planted.struck = planted.ended[0].status != 0
        shutil.rmtree(folder)
        shutil.rmtree(kept)
        left.rename(folder)
        return planted

    def limit(self, present: list[Path], rng: Random) -> str:
        """Return the mount option that leaves little room beside what is on the disk."""
        return f"size={sum(path.stat().st_size + 4096 for path in present) + rng.randrange(self.most_bytes)}"


@fault
class FullDisk(_Full):
    """The disk of the results."""

    name = "full disk"

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Let it be full while a point is measured, or while the sweep's report, which is much larger, is written."""
        shutil.rmtree(sweep.results / "smoke" / SWEEPS)
        self.most_bytes = rng.choice((100_000, 6_000_000))
        return super().plant(sweep, rng)

    errors = (rf"/results.* cannot be written \({_NO_ROOM}\); make room on that disk",)


@fault
class FullCache(_Full):
    """The disk of the prepared data."""

    name = "full cache"
    backends = ("ranks",)
    folder, most_bytes = "cache", 400_000
    errors = (rf"HARMOENY_CACHE: '.*' cannot be written \({_NO_ROOM}\)",)

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Begin with an empty cache."""
        for path in sweep.cache.iterdir():
            path.unlink()
        return super().plant(sweep, rng)


@fault
class FullTemporary(_Full):
    """The disk of temporary files, which Python itself uses for pipes and sockets."""

    name = "full temporary folder"
    backends = ("ranks",)
    folder = "temporary"
    errors = (r"TMPDIR", rf"{_NO_ROOM}")

    def limit(self, present: list[Path], rng: Random) -> str:
        """Leave room for few files, which are small: sockets, and notes of which run measures here."""
        return f"nr_inodes={1 + len(present) + rng.randrange(6)}"


@fault
class ReadOnly(Fault):
    """Permission to write goes away while the sweep runs."""

    name = "read-only folders"

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Take the permission from all folders below one, and give it back afterwards."""
        prefix: tuple[str, ...] = ()
        if os.geteuid() == 0:  # whom permissions do not bind otherwise
            prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
            _require(*prefix, "true")
        what, top = rng.choice([("results", sweep.results), ("cache", sweep.cache), ("temporary", sweep.temporary)])
        planted = Planted(f"{what} read-only", statuses=(1, 2))
        planted.errors = (r"(Permission denied|cannot be written|TMPDIR)",)
        when = moment(rng, points=len(SKEWS) - len(sweep.points()))
        closed: list[Path] = []
        with sweep.start(prefix=prefix) as command:
            try:
                if when(command):
                    planted.before = sweep.finished()
                    closed = [top, *(path for path in top.rglob("*") if path.is_dir())]
                    for path in closed:
                        path.chmod(0o555)
                    planted.struck = True
                    planted.keeps = top == sweep.temporary
                planted.ended.append(end(command))
            finally:
                for path in closed:
                    path.chmod(0o755)
        return planted
