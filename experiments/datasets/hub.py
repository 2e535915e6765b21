"""Data sets of the hub, read through `datasets`: from this machine's cache, or as a stream over the network."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from experiments.datasets.base import Dataset
from experiments.datasets.kit.documents import text_of
from results_schema.walk import walk_files

#: How long the hub may take to answer the first time.
_CONNECT_S = 4.0


@dataclass(kw_only=True)
class Hub(Dataset):
    """A data set of the hub. A run reads no more of it than it needs.

    Attributes:
        hub_name: its name on the hub, or a folder with its files.
        config_name: one of its configurations; null: it has only one.
        split: one of its splits.
        text_field: field of a row that holds the text; ``a.b`` is the field b of the field a.
        revision: version on the hub; null: the newest.
    """

    name: ClassVar[str] = "hub"
    description: ClassVar[str] = "any data set of the hub: dataset=hub dataset.hub_name=NAME"

    hub_name: str = ""
    config_name: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None

    @property
    def partial(self) -> bool:
        """Only as much is read as a run needs."""
        return True

    def validate(self) -> None:
        """Check that the fields are set.

        Raises:
            ValueError: an empty field.
        """
        for field in ("hub_name", "split", "text_field"):
            if not getattr(self, field):
                raise ValueError(f"dataset.{field}: '', must be set")

    def fingerprint(self) -> str:
        """Digest what is asked for, whose content never changes on the hub; of a folder, its files too.

        Raises:
            ValueError: the folder cannot be read.
        """
        digest = hashlib.sha256(json.dumps(asdict(self)).encode())
        folder = Path(self.hub_name)
        try:
            for path in sorted(walk_files(folder)) if folder.is_dir() else ():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.relative_to(folder)} {content}".encode())
        except OSError as error:
            raise ValueError(f"dataset.hub_name: {error.filename!r} cannot be read ({error.strerror})") from error
        return digest.hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Yield the documents.

        Raises:
            ValueError: the data set is not on this machine and cannot be reached, or has no text in the field.
        """
        for number, row in enumerate(self._rows()):
            if text := text_of(row, self.text_field, f"row {number} of {self.hub_name}"):
                yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets  # takes seconds

        reachable = Path(self.hub_name).is_dir() or _hub_answers()
        options: dict[str, Any] = {"name": self.config_name, "split": self.split, "revision": self.revision}
        try:
            with _quiet(offline=not reachable):
                yield from datasets.load_dataset(self.hub_name, streaming=reachable, **options)
        except Exception as error:  # `datasets` raises all kinds, of many libraries
            if isinstance(error, ValueError) and str(error).startswith("dataset."):
                raise
            reason = " ".join(str(error).split())[:200]
            state = "" if reachable else "is not on this machine, and the hub cannot be reached"
            raise ValueError(
                f"dataset: {self.name!r} ({self.hub_name}) {state or f'cannot be read ({reason})'}; download it where "
                "there is a network, or use a text of your own: dataset=local dataset.path=FILE_OR_FOLDER"
            ) from error


def _hub_answers() -> bool:
    """Tell within seconds whether the hub, or the proxy to it, takes connections; its own client tries for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    url = urlsplit(proxy or constants.ENDPOINT)
    answers: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            with socket.create_connection((url.hostname or "", port), timeout=_CONNECT_S):
                answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread, because resolving the name has no time-out.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    return any(answers)


@contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """Keep `datasets` from drawing progress bars and, if asked, from using the network."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        if not bars:
            datasets.enable_progress_bars()
