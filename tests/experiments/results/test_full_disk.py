"""A disk without room, and other places that cannot be written: one line, a failed manifest, nothing half finished."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.results.run_folder import RunFolder
from results_schema.atomic import WriteError, atomic_path, write_text
from results_schema.manifest import read_manifest
from tests.experiments.results.test_kept import STORED
from tests.programs import Programs
from tests.small_disk import can_mount, small_disk

Run = Callable[..., tuple[int, str]]

FULL = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]")


class TestMessage:
    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (errno.ENOSPC, r"\(No space left on device\); make room on that disk, or choose another folder"),
            (errno.EDQUOT, r"\(Disk quota exceeded\); make room"),
            (errno.ENAMETOOLONG, r"\(File name too long\); choose a shorter name"),
            (errno.EROFS, r"\(Read-only file system\); choose a folder that can be written \(results_dir=\)"),
        ],
    )
    def test_names_path_reason_and_remedy(self, number: int, said: str, tmp_path: Path) -> None:
        def write() -> None:
            with atomic_path(tmp_path / "layers.parquet"):
                raise OSError(number, "what a library says")

        with pytest.raises(WriteError, match=rf"^{tmp_path}/layers.parquet cannot be written {said}") as caught:
            write()
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match=r"x cannot be written .*File name too long"):
            write_text(tmp_path / ("x" * 300), "")

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match=r"cannot be written .*File exists|Not a directory"):
            write_text(tmp_path / "file" / "a.json", "")


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> RunFolder:
        (tmp_path / "manifest.json").write_text(json.dumps({"status": "running", "run_id": "x" * 2000}))
        (tmp_path / "layers.parquet").write_text("of an unfinished run")
        return RunFolder(tmp_path)

    def test_failed_is_written_in_place_where_there_is_no_room_for_a_second_file(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_room(*_: Any, **__: Any) -> None:
            raise FULL

        monkeypatch.setattr(tempfile, "mkstemp", no_room)
        folder.fail("no room")
        manifest = read_manifest(folder.path)
        assert (manifest["status"], manifest["error"]) == ("failed", "no room")

    def test_a_failed_run_has_no_tables(self, folder: RunFolder) -> None:
        folder.fail("why")
        assert [path.name for path in folder.path.iterdir()] == ["manifest.json"]


@pytest.mark.skipif(not can_mount(), reason="mounts a small file system")
class TestSmallDisk:
    """Commands whose results, or cache, lie on a file system of a few pages; they copy what is left of it."""

    @pytest.fixture
    def run(self, programs: Programs, tmp_path: Path) -> Run:
        """Runs the command on a disk at a path; what is returned is its status and its one error line."""

        def on_disk(mounted: Path, size: str, *arguments: str) -> tuple[int, str]:
            mounted.mkdir()
            variables = {"HARMOENY_CACHE": str(mounted)} if mounted.name == "cache" else {}
            disk = partial(small_disk, mounted, f"size={size}", tmp_path / "left")
            words = ("run.py", *STORED, "rounds=1", *arguments)
            done = programs.run(*words, variables=variables, inside=disk)
            output = done.stdout + done.stderr
            assert "Traceback" not in output, output
            errors = [line for line in output.splitlines() if line.startswith("error:")]
            assert len(errors) == 1, output
            return done.returncode, errors[0]

        return on_disk

    @pytest.mark.parametrize("size", ["4k", "16k", "32k"])
    @pytest.mark.ranks
    def test_results(self, size: str, run: Run, tmp_path: Path) -> None:
        results = tmp_path / "results"
        status, error = run(results, size, f"results_dir={results}")
        assert status == 1
        assert f"{results}/single/" in error
        assert "cannot be written (No space left on device); make room on that disk, or choose another folder" in error
        manifests = list((tmp_path / "left").rglob("manifest.json"))
        assert len(manifests) == (size != "4k")
        for path in manifests:
            assert read_manifest(path.parent)["status"] == "failed"
            assert not list(path.parent.glob("*.parquet"))

    def test_a_simulation(self, run: Run, tmp_path: Path) -> None:
        results = tmp_path / "results"
        simulator = ("backend=simulator", "hardware=dgx1_v100", f"results_dir={results}")
        status, error = run(results, "16k", *simulator)
        assert status == 1
        assert error.startswith(f"error: {results}/single/")
        assert error.endswith("(results_dir=)")
        (path,) = (tmp_path / "left").rglob("manifest.json")
        assert read_manifest(path.parent)["status"] == "failed"

    def test_a_sweep(self, run: Run, tmp_path: Path) -> None:
        results = tmp_path / "results"
        status, error = run(results, "0,nr_inodes=5", f"results_dir={results}", "--multirun")
        assert status in (1, 2)
        assert error.startswith(f"error: {results}/")
        assert "cannot be written (No space left on device)" in error

    @pytest.mark.parametrize("size", ["4k", "1m,ro"])
    def test_the_cache(self, size: str, run: Run, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        text = ("dataset=local", f"dataset.path={__file__}", f"results_dir={tmp_path / 'results'}")
        status, error = run(cache, size, *text)
        assert status == 2
        assert error.startswith(f"error: HARMOENY_CACHE: '{cache}/")
        assert "set HARMOENY_CACHE to a folder with room that can be written" in error
        assert not list((tmp_path / "results").rglob("manifest.json"))
