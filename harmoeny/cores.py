"""How many cores this process may use: its affinity, and the CPU quota of its container (cgroup v1 or v2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_SELF = Path("/proc/self")


@dataclass(frozen=True)
class Cores:
    """The cores of a process.

    Attributes:
        number: how many threads can run all the time; at least 1. A quota is rounded down: a thread more would make the
            kernel stop all of them for a part of every period.
        quota: cores that the tightest cgroup around the process grants on average; None: no limit.
        limited_by: what leaves fewer cores than the host has, in words; None where nothing does.
    """

    number: int
    quota: float | None
    limited_by: str | None


def usable_cores(proc: Path = _SELF, root: Path = Path("/")) -> Cores:
    """Return the cores that this process may use.

    Args:
        proc: the process's folder in ``/proc``.
        root: of the file system that its mounts are in.
    """
    pinned = len(os.sched_getaffinity(0))
    quota = cpu_quota(proc, root)
    if quota is not None and quota < pinned:
        return Cores(max(1, math.floor(quota)), quota, f"a CPU quota of {quota:g} cores")
    host = os.cpu_count() or pinned
    return Cores(pinned, quota, f"an affinity to {pinned} of {host} cores" if pinned < host else None)


def cpu_quota(proc: Path, root: Path) -> float | None:
    """Return the CPU quota in cores: the smallest of a process's cgroup and those above it, or None where none is set.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``) and
    https://docs.kernel.org/scheduler/sched-bwc.html (``cpu.cfs_quota_us``).

    Args:
        proc: the process's folder in ``/proc``.
        root: of the file system that its mounts are in.
    """
    try:
        folders = list(_cpu_cgroups(proc, root))
    except (OSError, ValueError, IndexError):
        return None  # no Linux, or a /proc that is hidden
    found = [quota for folder in folders if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def _cpu_cgroups(proc: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that can limit the process's CPU time, of both versions, inner ones first."""
    groups: dict[str, PurePosixPath] = {}  # "cpu" for version 1, "" for version 2
    for line in (proc / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= {name: PurePosixPath(path) for name in ("cpu", "") if name in controllers.split(",")}
    mounts: list[tuple[Path, PurePosixPath, PurePosixPath]] = []
    for line in (proc / "mountinfo").read_text(encoding="utf-8").splitlines():
        # ID PARENT DEVICE ROOT MOUNT_POINT OPTIONS [TAGS] - TYPE SOURCE SUPER_OPTIONS
        before, _, after = line.partition(" - ")
        mounted, mount_point = (_unescaped(field) for field in before.split()[3:5])
        kind, super_options = after.split()[0], after.split()[-1].split(",")
        if kind == "cgroup2" and "" in groups:
            group = groups[""]
        elif kind == "cgroup" and "cpu" in super_options and "cpu" in groups:
            group = groups["cpu"]
        else:
            continue
        mounts.append((root / mount_point.lstrip("/"), group, PurePosixPath(mounted)))
    for mount, group, part in mounts:
        # A mount of another part counts only where none has the process's own, whose path the host may have changed.
        if group.is_relative_to(part) or not any(g == group and g.is_relative_to(p) for _, g, p in mounts):
            yield from _upwards(mount, group, part)


def _upwards(mount_point: Path, group: PurePosixPath, mounted: PurePosixPath) -> Iterator[Path]:
    """Yield a cgroup's folder and those above it, as far as they are mounted."""
    # A container may see a mount of its own cgroup only, whose path on the host /proc still gives.
    inner = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
    if ".." in inner.parts:
        inner = PurePosixPath()
    for path in (inner, *inner.parents) if inner.parts else (inner,):
        yield mount_point / path


def _quota_of(folder: Path) -> float | None:
    """Return what one cgroup grants, in cores."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None  # the root has no such files


def _unescaped(field: str) -> str:
    """Undo how mountinfo writes blanks in paths."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
