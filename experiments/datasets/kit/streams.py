"""Files as streams of UTF-8: unpacked, decoded as their mark says, and refused where they hold no text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import pyarrow as pa

#: Shares of a text's characters that may be unreadable, and how many may be in any text. Of Latin-1 some 5 % are not
#: UTF-8, of single lines 12 %; of compressed files, pictures and programs 30 % and more.
MOST_UNDECODABLE = 0.2
MOST_CONTROL = 0.01
FEW = 3

_BLOCK_BYTES = 2**16
_HEAD_BYTES = 512
#: How often a file may be compressed; one that unpacks to itself would have no end.
_MOST_LAYERS = 3
#: Those that no text has: all but tab, the ends of lines and pages, backspace and escape.
_CONTROLS = bytes(code for code in (*range(32), 127) if code not in b"\t\n\v\f\r\b\x1b")
_WANTED = (
    "must be text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, as it is or in a .gz, .bz2, .xz, .zst, "
    ".lz4 or .zip file"
)

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")
_UNPACKERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b\x08": lambda stream: gzip.GzipFile(fileobj=stream),
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda stream: pa.CompressedInputStream(stream, "zstd"),
    b"\x04\x22\x4d\x18": lambda stream: pa.CompressedInputStream(stream, "lz4"),
}
_UNPACKERS |= {b"BZh%d" % level + kind: bz2.BZ2File for level in range(1, 10) for kind in (b"1AY&SY", b"\x17rE8P\x90")}
_ZIP = (b"PK\3\4", b"PK\5\6")
#: What holds so much text that the share of unreadable characters would not give it away.
_OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer and not the file; git lfs pull gets that",
    b"%PDF-": "is a PDF",
    b"{\\rtf": "is an RTF document",
    b"SQLite format 3\0": "is an SQLite data base",
    b"ARROW1": "is an Arrow file; save it as Parquet",
    b"\xff\xff\xff\xff": "is an Arrow stream; save it as Parquet",
    b"\xd0\xcf\x11\xe0": "is an Office document",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it",
    b"Rar!": "is a RAR archive; unpack it",
}
_TAR_MAGIC = slice(257, 262), b"ustar"
#: What the libraries that unpack raise, of damaged files.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, OverflowError, pa.ArrowException)


class UnreadableError(Exception):
    """A file, or a part of one, that holds no text; the message names it."""


@dataclass(frozen=True)
class Part:
    """A file, or a file in a ZIP archive.

    Attributes:
        name: for messages.
        suffix: says what is in it; those of compression are taken off.
        head: its first bytes.
        stream: its bytes, unpacked.
        path: where these bytes lie on the disk as they are; None: nowhere.
    """

    name: str
    suffix: str
    head: bytes
    stream: BinaryIO
    path: Path | None

    def utf8(self) -> BinaryIO:
        """Return the text as a stream of UTF-8; reading it raises `UnreadableError` where it is none."""
        return io.BufferedReader(_Utf8(self))

    def lines(self, newline: str | None = None) -> io.TextIOWrapper:
        """Return the text, to be read by line; ``newline`` as in `open`."""
        return io.TextIOWrapper(self.utf8(), encoding="utf-8", newline=newline)


def parts(path: Path) -> Iterator[Part]:
    """Yield the file, or the files in an archive in the order of their names; each can be read until the next is asked.

    Raises:
        UnreadableError: an archive of another kind, an encrypted one, or a format that holds no text.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if not head.startswith(_ZIP):
            yield _part(str(path), file, path)
            return
        if path.suffix.lower() != ".zip":
            raise UnreadableError(f"{str(path)!r} is an archive, as Office documents and e-books are, {_WANTED}")
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                hidden = any(part.startswith((".", "__MACOSX")) for part in PurePath(member.filename).parts)
                if not member.is_dir() and not hidden:
                    with archive.open(member) as stream:
                        yield _part(f"{path}/{member.filename}", cast(BinaryIO, stream), None)


def read_text(path: Path) -> str:
    """Return the text of a file, its ends of lines as they are.

    Raises:
        UnreadableError: it is none.
        OSError: the file cannot be read.
    """
    return "\n".join(part.lines(newline="").read() for part in parts(path))


@contextmanager
def refusing(field: str, path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one error that names it.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds no text.
    """
    try:
        yield
    except UnreadableError as error:
        raise ValueError(f"{field}: {error}") from error
    except OSError as error:
        if error.strerror is None:
            raise ValueError(f"{field}: {str(path)!r} is damaged ({_one_line(error)})") from error
        raise ValueError(f"{field}: {str(path)!r} cannot be read ({error.strerror})") from error
    except _DAMAGE as error:
        raise ValueError(f"{field}: {str(path)!r} is damaged ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _part(name: str, stream: BinaryIO, path: Path | None) -> Part:
    """Unpack a stream as often as it is packed."""
    for _ in range(_MOST_LAYERS):
        head = stream.read(_HEAD_BYTES)
        stream = cast(BinaryIO, io.BufferedReader(_Chain(head, stream), _BLOCK_BYTES))
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
        if unpack is None:
            break
        stream, path = unpack(stream), None
    reason = next((reason for magic, reason in _OTHERS.items() if head.startswith(magic)), None)
    if head[_TAR_MAGIC[0]] == _TAR_MAGIC[1]:
        reason = "is a tar archive; unpack it"
    elif head.startswith(_ZIP):
        reason = "is an archive in an archive; unpack it"
    if reason is not None:
        raise UnreadableError(f"{name!r} {reason}; {_WANTED}")
    return Part(name, _suffix(name), head, stream, path)


def _suffix(name: str) -> str:
    path = PurePath(name.lower())
    while path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return path.suffix


class _Chain(io.RawIOBase):
    """Bytes that were read already, and then the stream that they are from."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] if self._head else self._stream.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Utf8(io.RawIOBase):
    """A part as UTF-8: what cannot be decoded becomes U+FFFD, and too much of that is refused."""

    def __init__(self, part: Part) -> None:
        self._name = part.name
        self._stream = part.stream
        encoding = next((name for mark, name in _MARKS.items() if part.head.startswith(mark)), "utf-8-sig")
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._ready = memoryview(b"")
        self._at_end = False
        self._num_characters = self._num_undecodable = self._num_control = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._at_end:
            block = self._stream.read(_BLOCK_BYTES)
            self._at_end = not block
            self._ready = memoryview(self._checked(self._decoder.decode(block, final=self._at_end)))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _checked(self, text: str) -> bytes:
        """Return the text in UTF-8 if, with all before it, it is readable."""
        data = text.encode()
        self._num_characters += len(text)
        self._num_undecodable += text.count("\ufffd")
        self._num_control += len(data) - len(data.translate(None, _CONTROLS))
        if self._num_undecodable > max(FEW, MOST_UNDECODABLE * self._num_characters) or (
            self._num_control > max(FEW, MOST_CONTROL * self._num_characters)
        ):
            share = (self._num_undecodable + self._num_control) / self._num_characters
            raise UnreadableError(
                f"{self._name!r} is no text ({share:.0%} of its first {self._num_characters:,} characters are "
                f"unreadable), {_WANTED}"
            )
        return data
