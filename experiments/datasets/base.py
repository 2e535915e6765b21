"""The interface of a data set: documents in a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True)
class Dataset(ABC):
    """A source of text; a keyword-only dataclass whose fields are the options ``dataset.<field>``."""

    name: ClassVar[str]
    description: ClassVar[str]

    @property
    def partial(self) -> bool:
        """Whether only as much is prepared as a run needs, because there is too much of it."""
        return False

    def validate(self) -> None:
        """Check the configuration and that the source is there, before any worker starts.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        return

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short digest that changes when the text does; part of the names of cached files."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the documents, always in the same order."""
