"""Reads what W&B recorded on disk, without its own code: wandb 0.31 has no reader in Python."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

Record: Any = vars(wandb_internal_pb2)["Record"]  # made by protobuf at import
_BLOCK = 32768
_FULL, _LAST = 1, 4


@dataclass(frozen=True)
class Recorded:
    """The one W&B run of a folder."""

    path: Path
    records: dict[str, list[Any]]

    @property
    def run(self) -> Any:
        (run,) = self.records["run"]
        return run

    @property
    def config(self) -> dict[str, Any]:
        return _items(self.run.config.update)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [_items(record.item) for record in self.records["history"]]

    @property
    def summary(self) -> dict[str, Any]:
        return {name: value for record in self.records["summary"] for name, value in _items(record.update).items()}

    def table(self, name: str) -> dict[str, Any]:
        (path,) = (self.path / "files" / "media" / "table").glob(f"{name}_*.json")
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def files(self) -> dict[str, bytes]:
        """Return the results' artifact: content by path."""
        (artifact,) = (record for record in self.records["artifact"] if record.type == "results")
        return {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}


def read_back(folder: Path) -> Recorded:
    """Read the one W&B run of a run's or sweep's folder."""
    wandb.teardown()  # the service writes the rest
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[Any]] = {}
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return Recorded(path.parent, found)


def _records(path: Path) -> Iterator[Any]:
    """Read a .wandb file: 7 bytes of header, then records in LevelDB's log format (blocks of 32 KiB)."""
    data, position, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if _BLOCK - position % _BLOCK < 7:  # too short for a header: padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(record)
            record = b""


def _items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}
