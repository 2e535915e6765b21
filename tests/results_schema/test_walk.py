"""Folders with links in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from results_schema.walk import walk_files


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in walk_files(folder))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder ``data`` with one file, beside a folder ``other`` with another."""
    for name in ("data/a.txt", "other/deep/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "data"


def test_links_to_folders_and_files_are_followed(data: Path) -> None:
    (data / "more").symlink_to(data.parent / "other")
    (data / "one.txt").symlink_to(data.parent / "other" / "deep" / "b.txt")
    assert names(data) == ["a.txt", "more/deep/b.txt", "one.txt"]
    link = data.parent / "link"
    link.symlink_to(data)
    assert names(link) == ["a.txt", "more/deep/b.txt", "one.txt"]


def test_links_in_a_circle_do_no_harm(data: Path) -> None:
    other = data.parent / "other"
    (data / "self").symlink_to(data)
    (data / "up").symlink_to(data.parent)
    (data / "out").symlink_to(other)
    (other / "back").symlink_to(data)
    (other / "loop").symlink_to("loop")
    assert names(data) == ["a.txt", "out/deep/b.txt", "out/loop"]


def test_a_folder_is_entered_once_and_by_its_own_name_if_it_has_one(data: Path) -> None:
    (data / "z").mkdir()
    (data / "z" / "c.txt").touch()
    (data / "first").symlink_to(data / "z")
    for name in ("one", "two"):
        (data / name).symlink_to(data.parent / "other")
    assert names(data) == ["a.txt", "one/deep/b.txt", "z/c.txt"]


def test_hidden_names_are_passed_over_and_hide_nothing_else(data: Path) -> None:
    (data / ".cache").symlink_to(data.parent / "other")
    (data / ".note").touch()
    (data / "seen").symlink_to(data.parent / "other")
    assert names(data) == ["a.txt", "seen/deep/b.txt"]


def test_a_folder_that_cannot_be_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list(walk_files(data))
    assert [path.name for path in walk_files(data, skip_unreadable=True)] == ["a.txt"]


def test_no_folder_has_no_files(tmp_path: Path) -> None:
    assert not list(walk_files(tmp_path / "no"))
