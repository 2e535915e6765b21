"""CPU quotas as containers set them: cgroup v1 and v2 as fake trees, and one real cgroup where this machine lets us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from experiments.launch.environment import num_threads
from experiments.results.manifest import new_manifest
from harmoeny.cores import Cores, cpu_quota, usable_cores
from tests.conftest import Load

V2 = "34 24 0:30 {root} /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate"
V1 = "38 31 0:34 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "39 31 0:35 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_FOLDER, V1_FOLDER = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"
_REAL = Path("/sys/fs/cgroup/cpu")


class Tree:
    """A root with a process's ``cgroup`` and ``mountinfo`` and with cgroups."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self.proc.mkdir(parents=True)

    def process(self, cgroup: str, *mounts: str) -> None:
        (self.proc / "cgroup").write_text(cgroup)
        (self.proc / "mountinfo").write_text("\n".join(("24 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts)) + "\n")

    def v2(self, path: str, cpu_max: str) -> None:
        self._write(f"{V2_FOLDER}/{path}/cpu.max", cpu_max)

    def v1(self, path: str, quota_us: int, period_us: int = 100_000) -> None:
        self._write(f"{V1_FOLDER}/{path}/cpu.cfs_quota_us", str(quota_us))
        self._write(f"{V1_FOLDER}/{path}/cpu.cfs_period_us", str(period_us))

    def quota(self) -> float | None:
        return cpu_quota(self.proc, self.root)

    def cores(self) -> Cores:
        return usable_cores(self.proc, self.root)

    def _write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text + "\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return Tree(tmp_path / "root")


@pytest.mark.parametrize(
    ("cpu_max", "quota"), [("max 100000", None), ("50000 100000", 0.5), ("350000 100000", 3.5), ("20000 10000", 2.0)]
)
def test_version_2_as_a_container_sees_it(tree: Tree, cpu_max: str, quota: float | None) -> None:
    tree.process("0::/\n", V2.format(root="/"))
    tree.v2("", cpu_max)
    assert tree.quota() == quota


@pytest.mark.parametrize(
    ("inner", "outer", "quota"), [("max", "200000", 2.0), ("100000", "max", 1.0), ("3000", "8000", 0.03)]
)
def test_version_2_takes_the_tightest_on_the_way_up(tree: Tree, inner: str, outer: str, quota: float) -> None:
    tree.process("0::/user.slice/job.scope\n", V2.format(root="/"))
    tree.v2("user.slice", f"{outer} 100000")
    tree.v2("user.slice/job.scope", f"{inner} 100000")
    tree.v2("other.slice", "1000 100000")
    assert tree.quota() == quota


@pytest.mark.parametrize("root", ["/", "/docker/4711", "/docker"])
def test_version_1_whatever_part_is_mounted(tree: Tree, root: str) -> None:
    path = "/docker/4711"
    tree.process(f"9:memory:/docker/4711\n4:cpu,cpuacct:{path}\n0::/\n", MEMORY, V1.format(root=root))
    tree.v1(str(Path(path).relative_to(root)), 150_000)
    assert tree.quota() == 1.5


def test_version_1_without_a_limit(tree: Tree) -> None:
    tree.process("4:cpu,cpuacct:/docker/4711\n", V1.format(root="/"))
    tree.v1("docker/4711", -1)
    assert tree.quota() is None


def test_version_1_limits_above_count(tree: Tree) -> None:
    tree.process("4:cpuacct,cpu:/kubepods/burstable/pod1\n", V1.format(root="/"))
    tree.v1("kubepods/burstable/pod1", -1)
    tree.v1("kubepods/burstable", 250_000, 50_000)
    tree.v1("kubepods", 1_000_000)
    assert tree.quota() == 5.0


def test_both_versions_at_once(tree: Tree) -> None:
    tree.process(
        "4:cpu,cpuacct:/a\n0::/b\n", V1.format(root="/"), V2.format(root="/").replace("cgroup ro", "cgroup/unified ro")
    )
    tree.v1("a", 400_000)
    tree._write("sys/fs/cgroup/unified/b/cpu.max", "300000 100000")
    assert tree.quota() == 3.0


def test_a_mount_of_another_cgroup_is_nobody_s_limit(tree: Tree) -> None:
    other = V2.format(root="/docker/other").replace("/sys/fs/cgroup ", "/var/lib/other ")
    tree.process("0::/user.slice\n", other, V2.format(root="/"))
    tree.v2("user.slice", "300000 100000")
    tree._write("var/lib/other/cpu.max", "10000 100000")
    assert tree.quota() == 3.0


def test_a_path_outside_of_the_mount_is_the_mount(tree: Tree) -> None:
    tree.process("0::/../../other\n", V2.format(root="/"))
    tree.v2("", "200000 100000")
    assert tree.quota() == 2.0


@pytest.mark.parametrize("damage", ["no proc", "no colon", "no value", "no number", "a period of nothing"])
def test_what_cannot_be_read_is_no_limit(tree: Tree, damage: str) -> None:
    tree.process("nonsense\n" if damage == "no colon" else "0::/\n", V2.format(root="/"))
    tree.v2(
        "", {"no value": "", "no number": "many 100000", "a period of nothing": "1000 0"}.get(damage, "100000 100000")
    )
    if damage == "no proc":
        (tree.proc / "cgroup").unlink()
    assert tree.quota() is None
    assert tree.cores() == Cores(8, None, None)


@pytest.mark.parametrize(
    ("quota", "number"), [("50000", 1), ("100000", 1), ("190000", 1), ("200000", 2), ("399000", 3), ("750000", 7)]
)
def test_a_quota_is_rounded_down_and_never_to_nothing(tree: Tree, quota: str, number: int) -> None:
    tree.process("0::/\n", V2.format(root="/"))
    tree.v2("", f"{quota} 100000")
    assert tree.cores() == Cores(number, int(quota) / 1e5, f"a CPU quota of {int(quota) / 1e5:g} cores")


def test_a_quota_above_the_cores_limits_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.process("0::/\n", V2.format(root="/"))
    tree.v2("", "1600000 100000")
    assert tree.cores() == Cores(8, 16.0, None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert tree.cores() == Cores(2, 16.0, "an affinity to 2 of 8 cores")


def test_threads_and_manifest_follow_the_quota(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("harmoeny.cores.cpu_quota", lambda *_: 6.5)
    assert [num_threads(ranks) for ranks in (1, 2, 4, 8)] == [6, 3, 1, 1]
    host = new_manifest(load("experiment=smoke"))["host"]
    assert (host["num_cores"], host["cpu_quota"]) == (6, 6.5)
    assert host["cores_limited_by"] == "a CPU quota of 6.5 cores"


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    folder = _REAL / f"harmoeny-test-{uuid4().hex}"
    try:
        folder.mkdir()
        (folder / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.programs
def test_a_real_quota(half_a_core: Path) -> None:
    code = (
        f"open('{half_a_core / 'tasks'}', 'w').write('0')\n"
        "from harmoeny.cores import usable_cores\n"
        "print(usable_cores())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == str(Cores(1, 0.5, "a CPU quota of 0.5 cores"))
