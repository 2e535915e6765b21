"""Users' own files and folders: every row a document, and what is wrong with one is named."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets.local import Local
from experiments.text.tokens import prepare_tokens
from tests.experiments.datasets.row_files import ROWS, WRITERS, written
from tests.experiments.datasets.test_datasets import VOCAB_SIZE


class TestFiles:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_every_row_is_a_document(self, kind: str, tmp_path: Path) -> None:
        data = Local(path=written(tmp_path, kind))
        data.validate()
        assert list(data.documents()) == [row["text"] for row in ROWS]

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_field_inside_a_field(self, kind: str, tmp_path: Path) -> None:
        data = Local(path=written(tmp_path, kind), text_field="translation.en")
        assert list(data.documents()) == ["Word 0", "Word 1", "Word 2"]
        assert data.fingerprint() != Local(path=data.path).fingerprint()

    def test_a_folder_is_read_file_by_file(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "last.txt").write_text("last")
        (tmp_path / "a.txt").write_text("one\n\ntwo")
        (tmp_path / ".hidden").write_text("never")
        written(tmp_path, "jsonl")
        (tmp_path / "rows.jsonl").rename(tmp_path / "b" / "first.jsonl")
        data = Local(path=str(tmp_path))
        data.validate()
        assert list(data.documents()) == ["one", "two", *(row["text"] for row in ROWS), "last"]
        before = data.fingerprint()
        (tmp_path / "a.txt").write_text("one\n\nthree")
        assert data.fingerprint() != before

    @pytest.mark.parametrize(
        ("kind", "field", "message"),
        [
            ("jsonl", "body", r"dataset\.text_field: 'body', must be a field with text; row 1 of .* has id, text, "),
            ("parquet", "id", r"dataset\.text_field: 'id', must be a field with text; row 1 of .* has id, text"),
            ("csv", "translation.en", r"dataset\.text_field: 'translation\.en', must be a field with text; row 1 of"),
        ],
    )
    def test_a_field_without_text_is_named(self, kind: str, field: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            Local(path=written(tmp_path, kind), text_field=field).validate()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.jsonl", b'{"text": "a"}\n{"text": "b', r"dataset\.path: line 2 of .* is no JSON"),
            ("x.parquet", b"PAR1", r"dataset\.path: .* is no readable Parquet file"),
        ],
    )
    def test_a_damaged_file_is_named(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{message}"):
            list(Local(path=str(tmp_path / name)).documents())


def test_documents_of_large_files_are_read_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_text("\n\n".join(f"paragraph {i}" for i in range(5000)))
    data = Local(path=str(tmp_path / "large"))
    assert not data.partial
    whole = prepare_tokens(data, VOCAB_SIZE, num_tokens=100)
    monkeypatch.setattr("experiments.datasets.local._LARGE_BYTES", 1000)
    part = prepare_tokens(data, VOCAB_SIZE, num_tokens=100)
    assert part.num_tokens == 100 < whole.num_tokens
    assert list(islice(np.load(part.path), 100)) == list(islice(np.load(whole.path), 100))
