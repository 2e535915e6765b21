"""Temporary folders that cannot be removed: nobody is told by a traceback."""

from __future__ import annotations

import os
from multiprocessing import util
from pathlib import Path
from typing import Any

import pytest

from experiments.launch.temporary import temporary_folder
from tests.programs import Programs

_ENDS = """
import os, sys
from multiprocessing import util
from experiments.launch.temporary import provide_sockets_folder
provide_sockets_folder()
folder = util.get_temp_dir()
provide_sockets_folder()
assert util.get_temp_dir() == folder
open(os.path.join(folder, "socket"), "w").close()
if sys.argv[1] == "closed":
    def refuse(*given, **named):
        raise PermissionError(13, "Permission denied")
    os.unlink = os.rmdir = refuse
print(folder)
"""


def test_it_ends_with_the_block() -> None:
    with temporary_folder("ours-") as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()


def test_what_cannot_be_removed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied", *given[:1])

    with temporary_folder("ours-") as folder:
        monkeypatch.setattr(os, "rmdir", refuse)
    monkeypatch.undo()
    folder.rmdir()


@pytest.mark.parametrize("kept", ["open", "closed"])
def test_sockets_folder_ends_with_the_process_without_a_word(kept: str, programs: Programs, tmp_path: Path) -> None:
    done = programs.run("-c", _ENDS, kept, variables={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    assert folder.exists() == (kept == "closed")
    assert Path(util.get_temp_dir()) != folder
