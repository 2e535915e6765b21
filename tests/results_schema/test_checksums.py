"""Files of a finished run that are not as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from results_schema.checksums import checksums, damaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "layers.parquet").write_bytes(bytes(1000))
    (tmp_path / "summary.json").write_text("{}")
    return tmp_path


def test_what_is_as_it_was_is_whole(folder: Path) -> None:
    manifest = {"checksums": checksums(folder)}
    (folder / "summary.json").write_text("made anew from the tables")
    assert set(manifest["checksums"]) == {"config.yaml", "layers.parquet"}
    assert damaged(folder, manifest) == []


@pytest.mark.parametrize("content", [bytes(999), bytes(500) + b"\1" + bytes(499), b"", None])
def test_a_cut_flipped_empty_or_missing_file_is_damaged(folder: Path, content: bytes | None) -> None:
    manifest = {"checksums": checksums(folder)}
    path = folder / "layers.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    assert damaged(folder, manifest) == [path]


def test_a_run_of_an_earlier_version_says_nothing(folder: Path) -> None:
    assert damaged(folder, {"status": "finished"}) == []
