"""One copy of a model's weights for all ranks of a host: the first builds it, the others map the same memory."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import LayerExperts

#: Offsets of tensors in the shared memory, in bytes.
_ALIGNMENT = 4096

#: Where a tensor is referred to, as ``container[key]``; and what a tensor looks like: name, shape and type.
_Ref = tuple[MutableMapping[str, Any], str]
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


def ranks_on_host(comm: Communicator) -> int:
    """Return how many ranks this rank's host has; all ranks call it together."""
    return comm.gather_objects(socket.gethostname()).count(socket.gethostname())


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
    refs = _references(model.module)
    refs |= {
        f"expert {i} {name}": [(layer.weights, name)] for i, layer in enumerate(model.experts) for name in layer.weights
    }
    _share(refs, comm, local_rank)


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


def _references(module: nn.Module) -> dict[str, list[_Ref]]:
    """Return the references of a module to each of its parameters and buffers; several where they are tied."""
    refs: dict[int, list[_Ref]] = {}
    names: dict[str, int] = {}
    for path, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    refs.setdefault(id(tensor), []).append((held, name))
                    if len(refs[id(tensor)]) == 1:
                        names[f"{path}.{name}"] = id(tensor)
    return {name: refs[identity] for name, identity in names.items()}


def _share(refs: Mapping[str, Sequence[_Ref]], comm: Communicator, local_rank: int) -> None:
    """Move every tensor into shared memory, and let its references point there.

    The memory is a file without a name, in RAM where the host has a file system for that: it is gone with the last rank
    that maps it, however the ranks end. The others open it as a descriptor of the host's first rank.
    """
    own = [(name, held[key]) for name, ((held, key), *_) in refs.items()]
    described: list[Any] = [[(name, t.shape, t.dtype) for name, t in own]]
    own.clear()  # it would keep the originals alive
    dist.broadcast_object_list(described, src=0)
    (layout,) = described
    if [name for name, _, _ in layout] != list(refs):
        raise RuntimeError(f"ranks hold different weights: {sorted({name for name, _, _ in layout} ^ set(refs))}")
    offsets, total = _offsets(layout)
    with ExitStack() as stack:
        own_path: Path | None = None
        if local_rank == 0:
            descriptor = stack.enter_context(_unnamed_file(total)).fileno()
            own_path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            _fill(own_path, descriptor, refs, layout, offsets, total)
        host = socket.gethostname()
        everyone: list[Any] = [None] * comm.world_size
        dist.all_gather_object(everyone, (host, own_path))
        if local_rank != 0:
            path = next(path for of_host, path in everyone if of_host == host and path is not None)
            for name, tensor in _map(path, total, layout, offsets).items():
                _refer(refs[name], tensor)
        comm.barrier()


def _unnamed_file(total: int) -> IO[bytes]:
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]  # noqa: S108
    folder = next((folder for folder in folders if _has_room(folder, total)), folders[-1])
    return tempfile.TemporaryFile(dir=folder)


def _fill(
    path: Path,
    descriptor: int,
    refs: Mapping[str, Sequence[_Ref]],
    layout: Sequence[_Layout],
    offsets: Sequence[int],
    total: int,
) -> None:
    """Move this rank's tensors into the file one by one; each original is freed once it has moved."""
    os.ftruncate(descriptor, total)
    for (name, tensor), offset in zip(_map(path, total, layout, offsets).items(), offsets, strict=True):
        if tensor.nbytes:
            # Pages are allocated before they are written: on a full host this raises, a write would be killed.
            os.posix_fallocate(descriptor, offset, tensor.nbytes)
        (held, key), *_ = refs[name]
        tensor.copy_(held[key])
        _refer(refs[name], tensor)


def _refer(refs: Sequence[_Ref], tensor: Tensor) -> None:
    (held, key), *_ = refs
    new = nn.Parameter(tensor, requires_grad=False) if isinstance(held[key], nn.Parameter) else tensor
    for container, name in refs:
        container[name] = new


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
