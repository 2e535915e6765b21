"""Text as people have it: packed, in other encodings, damaged, or no text at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from experiments.datasets.local import Local
from tests.strategies import examples

TEXT = "First paragraph: caf\xe9, \u4f60\u597d, \U0001f512.\nIts second line.\n\nAnother one.\n" * 40
DOCUMENTS = [paragraph.strip() for paragraph in TEXT.split("\n\n")]
ROWS = [f"Row {i} \xe9" for i in range(50)]


def compressed(codec: str) -> Callable[[bytes], bytes]:
    def pack(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        packed: bytes = sink.getvalue().to_pybytes()
        return packed

    return pack


def zipped(content: bytes, name: str = "text.txt") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "zst": compressed("zstd"),
    "lz4": compressed("lz4"),
}
#: Formats that as written here have no checksum: only what is cut off can be noticed.
UNCHECKED = ("lzma", "zst", "lz4")


def read(path: Path, content: bytes, text_field: str = "text") -> list[str]:
    path.write_bytes(content)
    return documents(path, text_field)


def outcome(path: Path) -> list[str] | str:
    """Return the documents of a file, or why it is refused."""
    try:
        Local(path=str(path)).fingerprint()
        return documents(path)
    except ValueError as error:
        return str(error)


def documents(path: Path, text_field: str = "text") -> list[str]:
    data = Local(path=str(path), text_field=text_field)
    data.validate()
    return list(data.documents())


def parquet(rows: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), sink, row_group_size=20, compression="none", use_dictionary=False)
    return sink.getvalue()


def lines(rows: list[str]) -> bytes:
    return "".join(f"{json.dumps({'text': row})}\n" for row in rows).encode()


class TestPacked:
    @pytest.mark.parametrize("kind", PACKERS)
    def test_compressed_files_are_the_text_in_them(self, kind: str, tmp_path: Path) -> None:
        plain = tmp_path / "plain.txt"
        assert read(plain, TEXT.encode()) == DOCUMENTS
        packed = tmp_path / f"packed.txt.{kind}"
        assert read(packed, PACKERS[kind](TEXT.encode())) == DOCUMENTS
        assert Local(path=str(packed)).fingerprint() == Local(path=str(plain)).fingerprint()
        if kind != "lzma":  # two members one after the other are one text
            assert read(packed, PACKERS[kind](f"{TEXT}\n".encode()) * 2) == DOCUMENTS * 2
        # Neither is the name needed, nor does it deceive.
        assert read(tmp_path / "nothing", PACKERS[kind](TEXT.encode())) == DOCUMENTS
        assert read(packed, TEXT.encode()) == DOCUMENTS

    @pytest.mark.parametrize("kind", PACKERS)
    @pytest.mark.parametrize(("suffix", "content"), [("jsonl", lines(ROWS)), ("parquet", parquet(ROWS))])
    def test_rows_are_known_by_the_suffix_before(self, kind: str, suffix: str, content: bytes, tmp_path: Path) -> None:
        assert read(tmp_path / f"rows.{suffix}.{kind}", PACKERS[kind](content)) == ROWS
        plain = tmp_path / f"rows.{suffix}"
        plain.write_bytes(content)
        packed = Local(path=str(tmp_path / f"rows.{suffix}.{kind}"))
        assert packed.fingerprint() == Local(path=str(plain)).fingerprint()

    def test_archives_are_read_member_by_member(self, tmp_path: Path) -> None:
        path = tmp_path / "all.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("b/rows.jsonl.gz", gzip.compress(lines(["row"])))
            archive.writestr("b/rows.parquet", parquet(["column"]))
            archive.writestr("a.txt", "one\n\ntwo")
            archive.writestr("b/.hidden", b"\0\1\2\3")
            archive.writestr("__MACOSX/a.txt", b"\0\1\2\3")
        assert documents(path) == ["one", "two", "row", "column"]

    @pytest.mark.parametrize("kind", [*PACKERS, "zip"])
    @examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cut=st.floats(0.01, 0.99), flip=st.booleans())
    def test_damaged_ones_are_refused_by_name(self, kind: str, cut: float, flip: bool, tmp_path: Path) -> None:
        text = np.random.default_rng(0).integers(97, 123, 20_000, dtype=np.uint8).tobytes()
        content = zipped(text) if kind == "zip" else PACKERS[kind](text)
        at = round(cut * len(content))
        if flip and kind not in UNCHECKED:
            damaged = content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]
        else:
            damaged = content[:at]
        path = tmp_path / f"text.txt.{kind}" if kind != "zip" else tmp_path / "text.zip"
        path.write_bytes(damaged)
        found = outcome(path)
        assert found == [text.decode()] or str(path) in found, "read, where nobody looks at the byte, or refused"

    def test_what_is_large_counts_unpacked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "text.gz"
        path.write_bytes(gzip.compress(b"word " * 1000))
        assert path.stat().st_size < 1000
        assert not Local(path=str(path)).partial
        monkeypatch.setattr("experiments.datasets.local._LARGE_BYTES", 4000)
        assert Local(path=str(path)).partial


class TestEncodings:
    @pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
    @pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
    def test_a_mark_declares_the_encoding(self, name: str, suffix: str, tmp_path: Path) -> None:
        content = {
            "txt": TEXT,
            "csv": "text,id\r\n" + "".join(f'"{row}",1\r\n' for row in ROWS),
            "jsonl": lines(ROWS).decode(),
        }[suffix]
        mark = "\ufeff" if name.endswith("be") else ""
        plain, marked = tmp_path / f"plain.{suffix}", tmp_path / f"marked.{suffix}"
        expected = read(plain, content.encode())
        assert expected == (DOCUMENTS if suffix == "txt" else ROWS)
        assert read(marked, (mark + content).encode(name)) == expected
        assert Local(path=str(marked)).fingerprint() == Local(path=str(plain)).fingerprint()

    def test_fingerprint_of_plain_text_is_that_of_its_bytes(self, tmp_path: Path) -> None:
        """As in all versions, so that runs keep their names."""
        (tmp_path / "a.txt").write_text("one\r\ntwo\n")
        (tmp_path / "b.csv").write_text("text,id\nthree,1\n")
        assert Local(path=str(tmp_path / "a.txt")).fingerprint() == "31af0f1a23cd8c3c"
        assert Local(path=str(tmp_path)).fingerprint() == "c04ac68029bc279d"

    @pytest.mark.parametrize("language", ["latin-1", "cp1252"])
    def test_some_characters_that_are_not_utf8_are_replaced(self, language: str, tmp_path: Path) -> None:
        text = "Les h\xf4tes de la for\xeat \xe9taient l\xe0."
        assert read(tmp_path / "text", text.encode(language)) == [
            "Les h\ufffdtes de la for\ufffdt \ufffdtaient l\ufffd."
        ]


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).normal(size=2000).astype(np.float32))
    return file.getvalue()


def _arrow(version: int) -> bytes:
    sink, table = io.BytesIO(), pa.table({"text": ["word " * 100] * 100})
    if version:
        pyarrow.feather.write_feather(table, sink, compression="uncompressed", version=version)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _sqlite() -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute("create table t (text)")
    base.executemany("insert into t values (?)", [["word " * 500]] * 100)
    return bytes(base.serialize())


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("text.txt")
        member.size = len(TEXT.encode())
        archive.addfile(member, io.BytesIO(TEXT.encode()))
    return file.getvalue()


class TestNoText:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            pytest.param(lambda: TEXT.encode("utf-16-le"), "is no text", id="utf-16 without a mark"),
            pytest.param(lambda: TEXT.encode("utf-32-be"), "is no text", id="utf-32 without a mark"),
            pytest.param(
                lambda: "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!".encode("koi8-r"),
                "is no text",
                id="koi8-r",
            ),
            pytest.param(lambda: Path(sys.executable).resolve().read_bytes(), "is no text", id="a program"),
            pytest.param(_npy, "is no text", id="an array"),
            pytest.param(lambda: bytes(range(256)), "is no text", id="all bytes"),
            pytest.param(lambda: b"\0\1\2\3\4", "is no text", id="five bytes"),
            pytest.param(lambda: b"word " * 20 + b"\0" * 5, "is no text", id="some NULs"),
            pytest.param(_tar, "is a tar archive", id="tar"),
            pytest.param(lambda: gzip.compress(_tar()), "is a tar archive", id="tar.gz"),
            pytest.param(_sqlite, "is an SQLite data base", id="sqlite"),
            pytest.param(lambda: _arrow(0), "is an Arrow stream", id="arrow stream"),
            pytest.param(lambda: _arrow(2), "is an Arrow file", id="arrow file"),
            pytest.param(lambda: b"%PDF-1.4\nBT (Hello) Tj ET\n", "is a PDF", id="pdf"),
            pytest.param(lambda: zipped(b"<xml>text</xml>", "word/document.xml"), "is an archive", id="docx"),
            pytest.param(
                lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
                "is a Git LFS pointer",
                id="lfs",
            ),
        ],
    )
    def test_it_is_refused_by_name(self, content: Callable[[], bytes], reason: str, tmp_path: Path) -> None:
        path = tmp_path / "file.docx"
        with pytest.raises(ValueError, match=rf"^dataset\.path: '.*/file\.docx' {reason}") as refused:
            read(path, content())
        assert "\n" not in str(refused.value)
        # Also where it is one file of many.
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ValueError, match=rf"^dataset\.path: '.*/file\.docx' {reason}"):
            Local(path=str(tmp_path)).validate()

    def test_the_share_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is no text \(50% of its first 200 characters are unreadable\), must be"):
            read(tmp_path / "file", b"a\0" * 100)

    def test_what_gets_unreadable_late_is_refused_when_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"word\n\n" * 40_000 + bytes(20_000))
        Local(path=str(path)).validate()
        with pytest.raises(ValueError, match=r"^dataset\.path: '.*/file' is no text \("):
            list(Local(path=str(path)).documents())

    def test_encrypted_archives_and_archives_in_archives(self, tmp_path: Path) -> None:
        content = bytearray(zipped(b"text"))
        content[6] |= 1  # says that the member is encrypted, in both headers
        content[content.index(b"PK\1\2") + 8] |= 1
        with pytest.raises(ValueError, match=r"^dataset\.path: '.*/a\.zip' is damaged \(.*encrypted"):
            read(tmp_path / "a.zip", bytes(content))
        with pytest.raises(ValueError, match=r"^dataset\.path: '.*/a\.zip/b\.zip' is an archive in an archive"):
            read(tmp_path / "a.zip", zipped(zipped(b"text"), "b.zip"))
        with pytest.raises(ValueError, match=r"^dataset\.path: '.*/a\.zip\.gz' is an archive in an archive"):
            read(tmp_path / "a.zip.gz", gzip.compress(zipped(b"text")))

    def test_empty_ones(self, tmp_path: Path) -> None:
        for kind, pack in (PACKERS | {"zip": zipped, "txt": bytes, "json": bytes, "csv": bytes}).items():
            for content in (b"", b" \n"):
                with pytest.raises(ValueError, match=r"is empty, must hold text$"):
                    read(tmp_path / f"file.{kind}", pack(content))
        with pytest.raises(ValueError, match=r"is empty, must hold text$"):
            read(tmp_path / "mark", codecs.BOM_UTF16_LE)

    @pytest.mark.parametrize("suffix", ["", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".zip", ".gz"])
    @examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        head=st.sampled_from(
            [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE]
            + [pack(lines(ROWS)) for pack in PACKERS.values()]
            + [zipped(b"text"), parquet(ROWS), b"[", b'{"text": "', b"text,id\n", b"PAR1"]
        ),
        cut=st.floats(0, 1),
        tail=st.binary(max_size=300),
    )
    @example(head=b"[" * 100_000, cut=1.0, tail=b"")
    @example(head=b"[" + b"9" * 10_000 + b"]", cut=1.0, tail=b"")
    @example(head=parquet(ROWS), cut=0.5, tail=parquet(ROWS)[-400:])
    def test_any_bytes_are_read_or_refused_in_one_line(
        self, suffix: str, head: bytes, cut: float, tail: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(head[: round(cut * len(head))] + tail)
        found = outcome(path)
        if isinstance(found, str):
            assert found.startswith(("dataset.path: ", "dataset.text_field: "))
            assert str(path) in found
            assert "\n" not in found
        else:
            assert found
            assert all(document.strip() == document and document.encode() for document in found)
