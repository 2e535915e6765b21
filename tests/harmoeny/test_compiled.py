"""Compiled code on disk: kept, made anew where it is damaged, and never a reason to fail."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import IndexDataCacheFile

from tests.programs import ROOT, Programs

MODULE = """
from harmoeny.compiled import compiled

@compiled
def twice(x):
    return 2 * x
"""
#: Numba was imported before the folder for its cache was known.
CALL = """
import numba
numba.core.config.reload_config()
import loops
print(loops.twice(21), loops.twice(0.5), dict(loops.twice.stats.cache_hits) != {})
"""
COMPILED, KEPT = (42, 1.0, False), (42, 1.0, True)


SEVERAL = """
import harmoeny.compiled as compiling

compiling._UNNOTICED_S = {patience_s}
compiling.on_compiling(lambda: print("compiling"))

@compiling.compiled
def once(x):
    return x + 1

@compiling.compiled
def twice(x):
    return once(once(x))

first = [twice(1), twice(2.0), twice(3)]
compiling.on_compiling(lambda: print("compiling again"))
print([*first, once(True)])
"""


def imported(folder: Path) -> Any:
    """Return the folder's loops.py, executed anew."""
    spec = importlib.util.spec_from_file_location("loops", folder / "loops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loops:
    """A module with a compiled function, which every call imports anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        (folder / "loops.py").write_text(MODULE)

    def call(self) -> tuple[int, float, bool]:
        """Return two results, and whether any code came from the disk."""
        module = imported(self.folder)
        return module.twice(21), module.twice(0.5), dict(module.twice.stats.cache_hits) != {}

    def call_in_a_program(self, programs: Programs, before: str = "", status: int = 0) -> str:
        code = f"import sys; sys.path.append('{ROOT}'); {before}\n{CALL}"
        done = programs.run("-c", code, cwd=self.folder, variables={"NUMBA_CACHE_DIR": str(self.cache)})
        assert done.returncode == status, done.stderr
        return done.stdout.strip()

    def files(self, kind: str) -> list[Path]:
        return sorted(self.cache.rglob(f"*.{kind}"))


@pytest.fixture
def loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loops:
    loops = Loops(tmp_path)
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(loops.cache))
    return loops


def test_code_is_kept_and_used_again(loops: Loops, programs: Programs) -> None:
    assert loops.call_in_a_program(programs) == "42 1.0 False"
    assert len(loops.files("nbi")) == 1
    assert len(loops.files("nbc")) == 2, "one per signature"
    assert loops.call_in_a_program(programs) == "42 1.0 True"


def test_of_several_processes_one_compiles(loops: Loops, programs: Programs) -> None:
    """Each of the two signatures is missed by the process that compiles it, and found by the others, which waited."""
    count = """
import atexit, os, time
from pathlib import Path
import harmoeny.compiled
atexit.register(lambda: print(sum(loops.twice.stats.cache_misses.values())))
Path(f"ready{os.getpid()}").touch()
while len(list(Path().glob("ready*"))) < 4:
    time.sleep(0.001)
"""
    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(loops.call_in_a_program, programs, count) for _ in range(4)]
        misses = [int(call.result().splitlines()[-1]) for call in calls]
    assert sum(misses) == 2
    (loops.cache / "held").mkdir()  # no file to lock
    for lock in loops.files("lock"):
        lock.unlink()
        lock.symlink_to(loops.cache / "held")
    for path in loops.files("nbi"):
        path.unlink()
    assert loops.call() == COMPILED, "where no lock can be had, it compiles without"


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_file_is_made_anew(loops: Loops, kind: str) -> None:
    loops.call()
    whole = {path: path.read_bytes() for path in loops.files(kind)}
    for damage in (
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(b ^ 1 if i == len(content) * 2 // 3 else b for i, b in enumerate(content)),
    ):
        for path, content in whole.items():
            path.write_bytes(damage(content))
        assert loops.call() == COMPILED
        assert loops.call() == KEPT


@pytest.mark.parametrize(
    ("before", "after", "result"),
    [
        ("same(factor * x)", "same(factor * x + 1)", "43 2.0 False"),  # a compiled function of another file
        ("FACTOR = 2", "FACTOR = 6 // 2", "63 1.5 False"),  # a constant
        ("return x", "return x + 1", "43 2.0 False"),  # a compiled function that the other file takes from a third one
        ("first: int", "first: int\n    third: int = 0", "42 1.0 False"),  # a type
        ("class Pair", "class Couple", "42 1.0 False"),  # a type that is gone
    ],
)
def test_what_a_function_takes_from_other_files_counts(
    loops: Loops, programs: Programs, before: str, after: str, result: str
) -> None:
    """Numba alone would go on with machine code that holds what the other file said before."""
    (loops.folder / "constants.py").write_text("FACTOR = 2\n")
    third = """
from harmoeny.compiled import compiled


@compiled
def same(x):
    return x
"""
    (loops.folder / "third.py").write_text(third)
    other = """
from typing import NamedTuple

from harmoeny.compiled import compiled
from third import same


class Pair(NamedTuple):
    first: int
    second: int = 0


@compiled
def product(factor, x):
    return same(factor * x)
"""
    (loops.folder / "other.py").write_text(other)
    whole = """
import other
from constants import FACTOR
from harmoeny.compiled import compiled

Pair = other.Pair if hasattr(other, "Pair") else other.Couple
from other import product


@compiled
def twice(x):
    return product(Pair(FACTOR, 0).first, x)
"""
    (loops.folder / "loops.py").write_text(whole)
    assert loops.call_in_a_program(programs) == "42 1.0 False"
    assert loops.call_in_a_program(programs) == "42 1.0 True"
    for name in ("constants.py", "other.py", "third.py"):
        path = loops.folder / name
        path.write_text(path.read_text().replace(before, after))
    assert loops.call_in_a_program(programs) == result


def test_a_process_that_is_killed_while_it_writes_leaves_no_code_of_earlier_sources(
    loops: Loops, programs: Programs
) -> None:
    assert loops.call_in_a_program(programs) == "42 1.0 False"
    path = loops.folder / "loops.py"
    path.write_text(MODULE.replace("2 * x", "x + 2 * x"))  # of another length, for Python's own cache
    for method in ("_save_index", "_save_data"):
        dying = (
            f"import os; from numba.core import caching as c; c.IndexDataCacheFile.{method} = lambda *_: os._exit(9)"
        )
        loops.call_in_a_program(programs, dying, status=9)
    assert loops.call_in_a_program(programs) == "63 1.5 False"
    assert loops.call_in_a_program(programs) == "63 1.5 True"
    assert len(loops.files("nb?")) == 3, "those of the earlier source are gone"


def test_without_a_folder_to_write_every_process_compiles(loops: Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so numba's own test of a folder is what fails here.
    nowhere = Path("/nowhere/file")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: nowhere.write_text(""))
    assert loops.call() == COMPILED
    assert not loops.files("*")


def test_a_full_disk_is_no_reason_to_fail(loops: Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", lambda *_: full.open("wb", buffering=0))
    assert loops.call() == COMPILED


@pytest.mark.programs
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a folder read-only")
def test_a_read_only_checkout_and_home_are_no_reason_to_fail(tmp_path: Path) -> None:
    mount = f"mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT} && mount -t tmpfs -o ro tmpfs {tmp_path}"
    code = (
        "import numpy as np; from harmoeny.plan import home_tokens; "
        "print(home_tokens(np.eye(2, dtype=int), np.arange(2)), home_tokens.stats.cache_path)"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && cd {ROOT} && exec {sys.executable} -c '{code}'"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[[[1", "0]", "[0", "0]]", "[[0", "0]", "[0", "1]]]", "None"]


@pytest.mark.parametrize(("patience_s", "told"), [(0.0, ["compiling"]), (1e6, [])])
def test_somebody_is_told_once_where_compiling_takes_long(
    patience_s: float, told: list[str], tmp_path: Path, programs: Programs
) -> None:
    (tmp_path / "several.py").write_text(SEVERAL.format(patience_s=patience_s))
    code = f"import sys; sys.path.append('{ROOT}'); import several"
    done = programs.run("-c", code, cwd=tmp_path, variables={"NUMBA_CACHE_DIR": str(tmp_path)})
    assert done.stdout.splitlines() == [*told, "[3, 4.0, 5, 2]"], done.stderr


def test_one_machine_code_serves_all_values_that_callers_write_down(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(
        "from harmoeny.compiled import compiled\n"
        "@compiled\ndef inner(x, flag, number):\n    return x + number if flag else x - number\n"
        "@compiled\ndef outer(x):\n    return inner(x, True, 1) + 10 * inner(x, False, 2)\n"
    )
    module = imported(tmp_path)
    assert module.outer(5) == 6 + 10 * 3
    assert module.inner(5, True, 1) == 6
    assert len(module.inner.signatures) == len(module.outer.signatures) == 1
