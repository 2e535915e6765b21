"""Any text of the user's: a file, or all files in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.datasets.base import Dataset
from experiments.datasets.kit.documents import count_bytes, documents_of, update_digest
from results_schema.walk import walk_files

#: Of a longer text only as much is read as a run needs.
_LARGE_BYTES = 64 * 2**20
_WANTED = "must be a file or a folder with text, JSON, JSON lines, Parquet or CSV"


@dataclass(kw_only=True)
class Local(Dataset):
    """A file or a folder. The paragraphs of a text file are documents, and the rows of JSON, Parquet and CSV.

    Files may be compressed. Those that hold no text are refused; docs/models.md says what is read, and how.

    Attributes:
        path: the file, or the folder, whose files (those of folders in it too) are read in the order of their names.
        text_field: field of JSON, Parquet and CSV; ``a.b`` is the field b of the field a.
    """

    name: ClassVar[str] = "local"
    description: ClassVar[str] = "text, JSON, Parquet or CSV: dataset=local dataset.path=FILE_OR_FOLDER"

    path: str = ""
    text_field: str = "text"

    @property
    def partial(self) -> bool:
        """Large files are read only as far as a run needs."""
        size = 0
        for file in self._files():
            size += count_bytes(file, _LARGE_BYTES - size)
            if size > _LARGE_BYTES:
                return True
        return False

    def validate(self) -> None:
        """Check that there is text, and that every file begins with some that can be read.

        Raises:
            ValueError: no path, no such file, no permission, no text in the field, or nothing but white space.
        """
        if not self.path:
            raise ValueError(f"dataset.path: '', {_WANTED}: dataset=local dataset.path=FILE_OR_FOLDER")
        files = self._files()
        if not files:
            raise ValueError(f"dataset.path: {self.path!r} has no files, {_WANTED}")
        firsts = [next(documents_of(file, self.text_field), None) for file in files]
        if not any(firsts):
            raise ValueError(f"dataset.path: {self.path!r} is empty, must hold text")

    def fingerprint(self) -> str:
        """Digest the files' text, wherever they lie, and the field that is read of them."""
        digest = hashlib.sha256()
        for file in self._files():
            update_digest(digest, file, self.text_field)
        return digest.hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Yield the documents, file by file."""
        for file in self._files():
            yield from documents_of(file, self.text_field)

    def _files(self) -> list[Path]:
        """Return the file, or the folder's files by name.

        Raises:
            ValueError: there is none, or something that is no file, or a folder that cannot be read.
        """
        path = Path(self.path)
        try:
            files = sorted(walk_files(path)) if path.is_dir() else [path]
            for file in files:
                if not file.is_file():
                    found = "is no file" if file.exists() else "does not exist"
                    raise ValueError(f"dataset.path: {str(file)!r} {found}, {_WANTED}")
        except OSError as error:
            raise ValueError(f"dataset.path: {error.filename!r} cannot be read ({error.strerror})") from error
        return files
