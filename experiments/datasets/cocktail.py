"""A mix of data sets, one document of each in turn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from experiments.datasets.arxiver import Arxiver
from experiments.datasets.base import Dataset
from experiments.datasets.bookcorpus import BookCorpus
from experiments.datasets.hub import Hub
from experiments.datasets.local import Local
from experiments.datasets.wikitext import WikiText
from experiments.datasets.wmt19 import WMT19

_KNOWN: dict[str, type[Hub]] = {cls.name: cls for cls in (BookCorpus, WikiText, WMT19, Arxiver)}


@dataclass(kw_only=True)
class Cocktail(Dataset):
    """One document of every part in turn, until the last part is used up.

    Attributes:
        parts: data sets of the hub by our names, files and folders.
    """

    name: ClassVar[str] = "cocktail"
    description: ClassVar[str] = "bookcorpus, wikitext, wmt19 and arxiver in turn (hub), or files: dataset.parts=[...]"

    parts: list[str] = field(default_factory=lambda: list(_KNOWN))

    @property
    def partial(self) -> bool:
        """Only as much is read as a run needs."""
        return True

    def validate(self) -> None:
        """Check every part.

        Raises:
            ValueError: no parts, or one that is neither a data set nor a usable file.
        """
        if not self.parts:
            raise ValueError(f"dataset.parts: [], must name some of {', '.join(_KNOWN)}, files and folders")
        for part in self.parts:
            if not isinstance(part, str) or (part not in _KNOWN and not Path(part).exists()):
                raise ValueError(f"dataset.parts: {part!r}, must be one of {', '.join(_KNOWN)}, a file or a folder")
            self._part(part).validate()

    def fingerprint(self) -> str:
        """Digest the parts."""
        prints = [self._part(part).fingerprint() for part in self.parts]
        return hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Yield a document of every part in turn."""
        sources = [self._part(part).documents() for part in self.parts]
        while sources:
            for source in list(sources):
                document = next(source, None)
                if document is None:
                    sources.remove(source)
                else:
                    yield document

    @staticmethod
    def _part(part: str) -> Dataset:
        return _KNOWN[part]() if part in _KNOWN else Local(path=part)
