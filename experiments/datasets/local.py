"""Any text file of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from experiments.datasets.base import Dataset


@dataclass(kw_only=True)
class Local(Dataset):
    """A UTF-8 text file; its paragraphs are the documents.

    Attributes:
        path: the file. Bytes that are not UTF-8 are read as the replacement character.
    """

    name: ClassVar[str] = "local"
    description: ClassVar[str] = "a text file: dataset=local dataset.path=FILE"

    path: str = ""

    def validate(self) -> None:
        """Check that the file can be read and holds text.

        Raises:
            ValueError: no path, no such file, a folder, no permission, or nothing but white space.
        """
        if not self.path:
            raise ValueError("dataset.path: '', must be a text file: dataset=local dataset.path=FILE")
        path = Path(self.path)
        try:
            if not path.is_file():
                found = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
                raise ValueError(f"dataset.path: {self.path!r} {found}, must be a text file")
            empty = next(self.documents(), None) is None
        except OSError as error:
            raise ValueError(f"dataset.path: {self.path!r} cannot be read ({error.strerror})") from error
        if empty:
            raise ValueError(f"dataset.path: {self.path!r} is empty, must hold text")

    def fingerprint(self) -> str:
        """Digest the file's bytes."""
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Yield the paragraphs, reading line by line."""
        with Path(self.path).open(encoding="utf-8", errors="replace") as file:
            for has_text, lines in groupby(file, key=lambda line: bool(line.strip())):
                if has_text:
                    yield "".join(lines).strip()
