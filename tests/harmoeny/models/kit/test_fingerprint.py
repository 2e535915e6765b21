"""A saved model's digest changes with whatever its outputs depend on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harmoeny.models.kit import fingerprint
from harmoeny.models.kit.fingerprint import folder_fingerprint
from harmoeny.models.transformers import Transformers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "a.safetensors", "b.safetensors", "a.safetensors.index.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "a.safetensors", "a.safetensors.index.json"])
def test_changes_with_the_content_of_every_file(folder: Path, name: str) -> None:
    before = folder_fingerprint(folder, weights=True)
    assert folder_fingerprint(folder, weights=True) == before
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert folder_fingerprint(folder, weights=True) != before


def test_place_and_other_files_do_not_matter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = folder_fingerprint(folder, weights=True)
    (folder / "README.md").write_text("words")
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert folder_fingerprint(other, weights=True) == before


def test_drawn_weights_depend_on_the_configuration_only(folder: Path) -> None:
    before = folder_fingerprint(folder, weights=False)
    (folder / "a.safetensors").write_bytes(b"other")
    assert folder_fingerprint(folder, weights=False) == before


def test_swapped_files_are_another_model(folder: Path) -> None:
    before = folder_fingerprint(folder, weights=True)
    (folder / "a.safetensors").rename(folder / "c")
    (folder / "b.safetensors").rename(folder / "a.safetensors")
    (folder / "c").rename(folder / "b.safetensors")
    assert folder_fingerprint(folder, weights=True) != before


@pytest.mark.parametrize("place", [0, 2**19, 2**21, -1])
def test_of_large_files_parts_are_read(folder: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 2**20)
    path = folder / "a.safetensors"
    content = bytearray(os.urandom(2**23))
    path.write_bytes(content)
    before = folder_fingerprint(folder, weights=True)
    content[place] ^= 1
    path.write_bytes(content)
    assert folder_fingerprint(folder, weights=True) != before
    path.write_bytes(content + b"0")
    assert folder_fingerprint(folder, weights=True) != before


def test_a_router_between_the_blocks_of_a_large_file_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 2**20)
    monkeypatch.setattr(fingerprint, "_NUM_BLOCKS", 4)
    experts, router = torch.zeros(2**21), torch.zeros(2**10)
    path = folder / "a.safetensors"
    prints = []
    for scale in (0, 1):
        save_file({"a.experts": experts, "b.router": router + scale, "c.experts": experts + 1}, path)
        prints.append(folder_fingerprint(folder, weights=True))
    assert prints[0] != prints[1]
    path.write_bytes(b"\xff" * 2**21)  # a damaged file has one, too
    folder_fingerprint(folder, weights=True)


def test_a_model_without_files_has_none() -> None:
    assert Transformers(random_weights=True, architecture={"model_type": "mixtral"}).fingerprint() == ""
