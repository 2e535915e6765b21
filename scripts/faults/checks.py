"""What must hold after a fault, and after the sweep was started once more; each check yields what does not."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from results_schema.manifest import Status
from results_schema.tables import LAYERS, ROUTING, TABLES
from scripts.faults.fault import Ended, Planted
from scripts.faults.recomputed import differences
from scripts.faults.sweep import SKEWS, TinySweep

#: How a traceback begins or ends, and what Python says of an error that nobody can catch.
_TRACE = re.compile(r"Traceback |Exception ignored |([\w.]+\.)?\w+(Error|Exception)\b(: |$)")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
#: Where the report of torchrun on a failed rank begins; nothing of ours comes after it.
_TORCHRUN = re.compile(r"^E\d{4} .*\btorch/distributed/elastic/", re.MULTILINE)
#: How long others of this machine may need between making such a file and using it, or ending and removing it.
_OTHERS_S = 5
#: In the folder of temporary files, empty: where measurements of one machine know of each other, and PyTorch's cache.
_STAYS = {"harmoeny-measuring", f"torchinductor_{getpass.getuser()}"}


def after_fault(sweep: TinySweep, planted: Planted) -> Iterator[str]:
    """Check how commands ended, and what they left."""
    for ended in planted.ended:
        yield from _ending(ended, planted, sweep)
    yield from _changed(planted.before, sweep)
    yield from _unfinished(sweep, planted)
    if not planted.leaves and not planted.keeps:
        left = [path for path in sweep.temporary.iterdir() if path.name not in _STAYS]
        yield from (f"{path} is left" for path in left if not (planted.torchrun and path.match("torchelastic_*")))


def after_resume(sweep: TinySweep, planted: Planted, resumed: Sequence[Ended], reference: TinySweep) -> Iterator[str]:
    """Check that the sweep is complete, and that its numbers are right."""
    for ended in resumed:
        yield from _ending(ended, Planted("nothing"), sweep)
    yield from _changed(planted.before, sweep)
    if not sweep.is_complete:
        yield f"the sweep is not complete: {_statuses(sweep)}"
        return
    for skew, folder in sweep.points().items():
        yield from (f"skew={skew}: {difference}" for difference in differences(folder))
        yield from (f"skew={skew}: {difference}" for difference in _unlike(folder, reference.points()[skew], sweep))


def shared_memory() -> set[Path]:
    """Return the files of shared memory that there are now."""
    return set(_SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else set()


def left_in_memory(before: set[Path]) -> Iterator[str]:
    """Yield files of shared memory that are new, and that no living process has: whoever made them has ended."""
    until_s = time.monotonic() + _OTHERS_S
    while (left := _without_owner(shared_memory() - before)) and time.monotonic() < until_s:
        time.sleep(0.2)
    yield from (f"{path} is left in shared memory" for path in left)


def _without_owner(paths: set[Path]) -> set[Path]:
    held = {inode for process in psutil.process_iter() for inode in _inodes(process.pid)} if paths else set()
    return {path for path in paths if path.exists() and path.stat().st_ino not in held}


def _inodes(pid: int) -> Iterator[int]:
    """Yield the inodes of shared memory that a process maps or has open: a semaphore is mapped by another name."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        yield from (int(line.split()[4]) for line in lines if f" {_SHARED_MEMORY}/" in line)
        opened = Path(f"/proc/{pid}/fd").iterdir()
        yield from (path.stat().st_ino for path in opened if str(path.readlink()).startswith(f"{_SHARED_MEMORY}/"))
    except OSError:
        return  # it ended meanwhile


def _ending(ended: Ended, planted: Planted, sweep: TinySweep) -> Iterator[str]:
    lines = (_TORCHRUN.split(ended.output)[0] if planted.torchrun else ended.output).splitlines()
    said = [line for line in lines if line.startswith(("error:", "interrupted:"))]
    if ended.stray:
        yield f"processes {sorted(ended.stray)} are left"
    if any(_TRACE.match(line) for line in lines):
        yield "a traceback"
    if ended.status == 0:
        if said:
            yield f"exit status 0 in spite of {said}"
        if not sweep.is_complete:
            yield f"exit status 0, but {_statuses(sweep)}"
    elif not planted.struck or ended.status not in planted.statuses:
        yield f"exit status {ended.status}: {said}"
    elif planted.errors and said and not _is_explained(said, planted):
        yield f"the error should be one line for a point that matches {planted.errors}, is {said}"
    elif planted.errors and not said and ended.status < 128:
        yield f"exit status {ended.status} without a word"


def _is_explained(said: Sequence[str], planted: Planted) -> bool:
    """Tell whether every line names the fault, and no more of them than points, each another."""
    return len(said) == len(set(said)) <= len(SKEWS) and all(planted.explains(line) for line in said)


def _changed(before: Mapping[str, str], sweep: TinySweep) -> Iterator[str]:
    now = sweep.finished()
    for path, digest in before.items():
        if now.get(path) != digest:
            yield f"{path}, of a finished point, {'is another now' if path in now else 'does not count any more'}"


def _unfinished(sweep: TinySweep, planted: Planted) -> Iterator[str]:
    for skew, folder in sweep.points().items():
        manifest = sweep.manifests().get(skew)
        if manifest is None or manifest["status"] == Status.FINISHED:
            continue
        if manifest["status"] != Status.FAILED and not planted.leaves:
            yield f"skew={skew}: status {manifest['status']}, though nobody runs it"
        if manifest["status"] == Status.FAILED and not _is_said(manifest["error"], planted):
            yield f"skew={skew}: its manifest says {manifest['error']!r}, the screen does not"
        if manifest["status"] == Status.FAILED:
            yield from (f"{folder / t.file} beside a failed run" for t in TABLES if (folder / t.file).exists())


def _is_said(error: str, planted: Planted) -> bool:
    """Tell whether a manifest's error was on the screen, where an interruption has a line of its own."""
    said = "interrupted:" if error.startswith("interrupted by SIG") else error
    return any(said in ended.output for ended in planted.ended)


def _unlike(folder: Path, other: Path, sweep: TinySweep) -> Iterator[str]:
    """Compare what the seed alone decides: the routing, and everything that a simulation counts."""
    for table in (LAYERS, ROUTING) if sweep.backend == "simulator" else (ROUTING,):
        names = [column.name for column in table.columns if column.dtype != "float64"]
        own, reference = (
            pq.read_table(path / table.file, columns=names, partitioning=None) for path in (folder, other)
        )
        if not own.equals(reference):
            yield f"{table.file} is another than without the fault"


def _statuses(sweep: TinySweep) -> dict[float, str]:
    manifests = sweep.manifests()
    return {skew: str(manifests[skew]["status"]) if skew in manifests else "missing" for skew in SKEWS}
