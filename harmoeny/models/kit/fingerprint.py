"""What a saved model's numbers depend on, as a digest of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

#: Of a larger file only a part is read, so that a run of a large model does not begin with reading it twice.
_WHOLE_BYTES = 64 * 2**20
_HEADER_BYTES = 2**20
_BLOCK_BYTES = 16 * 2**10
_NUM_BLOCKS = 1024
_TENSOR_BYTES = 4 * 2**10


def folder_fingerprint(folder: Path, *, weights: bool) -> str:
    """Digest a saved model: ``config.json``, ``tokenizer.json`` and the weights, by name and content.

    Of a file above 64 MiB the digest covers its size, its first MiB (where safetensors keeps the names, shapes and
    places of all tensors), 1,024 blocks of 16 KiB at even distances up to its end, and the first 4 KiB of every
    tensor: a router is smaller than these distances.

    Args:
        folder: of the model.
        weights: whether its ``*.safetensors`` are read.

    Raises:
        OSError: a file cannot be read.
    """
    files = [path for name in ("config.json", "tokenizer.json") if (path := folder / name).is_file()]
    if weights:
        files += sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ino)
        digest.update(f"{path.name} {_file_digest(path.resolve(), state)}\n".encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _file_digest(path: Path, state: tuple[int, int, int]) -> str:
    """Digest a file; ``state`` (size, time of the last change, inode) tells whether it is still the same one."""
    size = state[0]
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} ".encode())
        for offset, length in (*_parts(size), *_tensors(file)):
            file.seek(offset)
            digest.update(file.read(length))
        return digest.hexdigest()


def _parts(size: int) -> Iterator[tuple[int, int]]:
    """Yield what is read of a large file: offsets and lengths in bytes."""
    yield 0, _HEADER_BYTES
    room = size - _HEADER_BYTES - _BLOCK_BYTES
    for index in range(_NUM_BLOCKS):
        yield _HEADER_BYTES + room * index // (_NUM_BLOCKS - 1), _BLOCK_BYTES


def _tensors(file: BinaryIO) -> list[tuple[int, int]]:
    """Return what is read of the tensors of a safetensors file: offsets and lengths in bytes; none where it is none."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length) if length < _WHOLE_BYTES else b"")
        begins = sorted(tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__")
        return [(8 + length + begin, _TENSOR_BYTES) for begin in begins]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return []  # a damaged file, which is refused when its weights are looked at
