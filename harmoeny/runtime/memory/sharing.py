"""One copy of a model's weights for all ranks of a host: the first builds it, the others map the same memory."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import LayerExperts

#: Offsets of tensors in the shared memory, in bytes.
_ALIGNMENT = 4096

#: Where a tensor is referred to, and what a tensor looks like: name, shape and type.
_Place = tuple[MutableMapping[str, Any], str]
_Layout = tuple[str, torch.Size, torch.dtype]


class WeightOwner(Protocol):
    """What has weights to share: a module, and experts that are not its parameters."""

    module: nn.Module
    experts: list[LayerExperts]


def rank_on_host(comm: Communicator) -> int:
    """Return this rank's number among the ranks of its host; all ranks call it together."""
    if comm.world_size == 1:
        return 0
    hosts: list[Any] = [None] * comm.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts[: comm.rank].count(hosts[comm.rank])


def share_model(model: WeightOwner, comm: Communicator, local_rank: int) -> None:
    """Replace all weights of a model by views on memory that the ranks of this host share; all ranks call it together.

    Weights move one by one, and the memory of each is freed once it has moved, so that a host never needs much more
    than one copy of the model.

    Args:
        model: built with weights where ``local_rank`` is 0, elsewhere on the ``meta`` device, without any.
        comm: the ranks.
        local_rank: this rank's number on its host.

    Raises:
        OSError: the host has no room.
    """
    if comm.world_size == 1:
        return
    places = _places(model.module)
    places |= {
        f"expert {i} {name}": [(layer.weights, name)] for i, layer in enumerate(model.experts) for name in layer.weights
    }
    _share(places, comm, local_rank)


def share_tensors(tensors: Mapping[str, Tensor], comm: Communicator, local_rank: int) -> dict[str, Tensor]:
    """Put tensors into memory that the ranks of this host share; all ranks call it together, with the same names.

    Returns:
        The tensors of the host's first rank by name; nobody may write to them.

    Raises:
        OSError: the host has no room.
    """
    shared = dict(tensors)
    _share({name: [(shared, name)] for name in shared}, comm, local_rank)
    return shared


def _places(module: nn.Module) -> dict[str, list[_Place]]:
    """Return where a module refers to each of its parameters and buffers; several places where it is tied."""
    places: dict[int, list[_Place]] = {}
    names: dict[str, int] = {}
    for path, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((held, name))
                    if len(places[id(tensor)]) == 1:
                        names[f"{path}.{name}"] = id(tensor)
    return {name: places[identity] for name, identity in names.items()}


def _share(places: Mapping[str, Sequence[_Place]], comm: Communicator, local_rank: int) -> None:
    """Move every tensor into shared memory, and refer to it there.

    The memory is a file, in RAM where the host has a file system for that; it has no name any more once all ranks have
    mapped it, so it goes when the last of them does.
    """
    own = [(name, held[key]) for name, ((held, key), *_) in places.items()]
    described: list[Any] = [(os.urandom(8).hex(), [(name, t.shape, t.dtype) for name, t in own])]
    own.clear()  # it would keep the originals alive
    dist.broadcast_object_list(described, src=0)
    token, layout = described[0]
    if [name for name, _, _ in layout] != list(places):
        raise RuntimeError(f"ranks hold different weights: {sorted({name for name, _, _ in layout} ^ set(places))}")
    offsets, total = _offsets(layout)
    # By host too: containers that stand for several hosts may see the same folders.
    file_name = f"harmoeny-{token}-{socket.gethostname()}"
    candidates = [Path(folder, file_name) for folder in ("/dev/shm", tempfile.gettempdir())]  # noqa: S108
    path = candidates[0]
    try:
        if local_rank == 0:
            path = next((p for p in candidates if _has_room(p.parent, total)), candidates[-1])
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.ftruncate(descriptor, total)
                for (name, tensor), offset in zip(_map(path, total, layout, offsets).items(), offsets, strict=True):
                    if tensor.nbytes:
                        # Taken piece by piece, as the originals go; without it a full host would kill us, not raise.
                        os.posix_fallocate(descriptor, offset, tensor.nbytes)
                    (held, key), *_ = places[name]
                    tensor.copy_(held[key])
                    _refer(places[name], tensor)
            finally:
                os.close(descriptor)
        comm.barrier()
        if local_rank != 0:
            path = next(p for p in candidates if p.exists())
            for name, tensor in _map(path, total, layout, offsets).items():
                _refer(places[name], tensor)
        comm.barrier()
    finally:
        if local_rank == 0:
            path.unlink(missing_ok=True)


def _refer(places: Sequence[_Place], tensor: Tensor) -> None:
    (held, key), *_ = places
    new = nn.Parameter(tensor, requires_grad=False) if isinstance(held[key], nn.Parameter) else tensor
    for place, place_key in places:
        place[place_key] = new


def _offsets(layout: Sequence[_Layout]) -> tuple[list[int], int]:
    offsets, total = [], 0
    for _, shape, dtype in layout:
        offsets.append(total)
        total += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return offsets, max(total, 1)


def _has_room(folder: Path, num_bytes: int) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > num_bytes


def _map(path: Path, total: int, layout: Sequence[_Layout], offsets: Sequence[int]) -> dict[str, Tensor]:
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total)
    tensors = {}
    for (name, shape, dtype), offset in zip(layout, offsets, strict=True):
        stride = torch.empty(shape, device="meta").stride()
        tensors[name] = torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)
    return tensors
