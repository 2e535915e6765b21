"""Any text of the user's: a file, or all files in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.datasets.base import Dataset
from experiments.datasets.kit.documents import documents_of, is_structured

#: Of a longer text only as much is read as a run needs.
_LARGE_BYTES = 64 * 2**20
_WANTED = "must be a file or a folder with text, JSON lines, Parquet or CSV"


@dataclass(kw_only=True)
class Local(Dataset):
    """A file or a folder. The paragraphs of a text file are documents, and the rows of JSON lines, Parquet and CSV.

    Attributes:
        path: the file, or the folder, whose files (those of folders in it too) are read in the order of their names.
            Bytes that are not UTF-8 are read as the replacement character.
        text_field: field of JSON lines, Parquet and CSV; ``a.b`` is the field b of the field a.
    """

    name: ClassVar[str] = "local"
    description: ClassVar[str] = "text, JSON lines, Parquet or CSV: dataset=local dataset.path=FILE_OR_FOLDER"

    path: str = ""
    text_field: str = "text"

    @property
    def partial(self) -> bool:
        """Large files are read only as far as a run needs."""
        return sum(file.stat().st_size for file in self._files()) > _LARGE_BYTES

    def validate(self) -> None:
        """Check that there is text.

        Raises:
            ValueError: no path, no such file, no permission, no text in the field, or nothing but white space.
        """
        if not self.path:
            raise ValueError(f"dataset.path: '', {_WANTED}: dataset=local dataset.path=FILE_OR_FOLDER")
        path = Path(self.path)
        try:
            if not path.is_file() and not path.is_dir():
                found = "is no file" if path.exists() else "does not exist"
                raise ValueError(f"dataset.path: {self.path!r} {found}, {_WANTED}")
            if not self._files():
                raise ValueError(f"dataset.path: {self.path!r} has no files, {_WANTED}")
            empty = next(self.documents(), None) is None
        except OSError as error:
            raise ValueError(f"dataset.path: {self.path!r} cannot be read ({error.strerror})") from error
        if empty:
            raise ValueError(f"dataset.path: {self.path!r} is empty, must hold text")

    def fingerprint(self) -> str:
        """Digest the files' bytes, wherever they lie, and the field that is read of them."""
        digest = hashlib.sha256()
        for file in self._files():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
            if is_structured(file):
                digest.update(f"{file.suffix.lower()} {self.text_field}".encode())
        return digest.hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Yield the documents, file by file."""
        for file in self._files():
            yield from documents_of(file, self.text_field)

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if not path.is_dir():
            return [path]
        hidden = (file for file in path.rglob("*") if any(p.startswith(".") for p in file.relative_to(path).parts))
        return sorted({file for file in path.rglob("*") if file.is_file()} - set(hidden))
