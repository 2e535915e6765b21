"""One copy of a model's weights for all ranks of a host: the first builds it, the others map the same memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmoeny.models.base import MoEModel
from harmoeny.runtime.comm import Communicator

#: Offsets of tensors in the shared memory, in bytes.
_ALIGNMENT = 4096


def share_model(model: MoEModel, comm: Communicator, local_rank: int) -> None:
    """Replace all weights of a model by views on memory that the ranks of this host share; all ranks call it together.

    Args:
        model: built with weights where ``local_rank`` is 0, elsewhere on the ``meta`` device, without any.
        comm: the ranks.
        local_rank: this rank's number on its host.
    """
    if comm.world_size == 1:
        return
    named: dict[str, Tensor] = {
        **{f"parameter {n}": p.detach() for n, p in model.module.named_parameters()},
        **{f"buffer {n}": b for n, b in model.module.named_buffers()},
        **{f"expert {i} {n}": w for i, layer in enumerate(model.experts) for n, w in layer.weights.items()},
    }
    shared = share_tensors(named, comm, local_rank)
    _assign(model.module, shared)
    for i, layer in enumerate(model.experts):
        for name in layer.weights:
            layer.weights[name] = shared[f"expert {i} {name}"]


def share_tensors(tensors: Mapping[str, Tensor], comm: Communicator, local_rank: int) -> dict[str, Tensor]:
    """Put tensors into memory that the ranks of this host share; all ranks call it together, with the same shapes.

    The memory is a file, in RAM where the host has a file system for that; it has no name any more once all ranks have
    mapped it, so it goes when the last of them does.

    Returns:
        The tensors by name; nobody may write to them.

    Raises:
        OSError: the host has no room.
    """
    offsets, total = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = total
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    token = [os.urandom(8).hex()]
    dist.broadcast_object_list(token, src=0)
    candidates = [Path(folder, f"harmoeny-{token[0]}") for folder in ("/dev/shm", tempfile.gettempdir())]  # noqa: S108
    path = candidates[0]
    try:
        if local_rank == 0:
            path = next((p for p in candidates if _has_room(p.parent, total)), candidates[-1])
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, max(total, 1))
            finally:
                os.close(descriptor)
            shared = _map(path, max(total, 1), tensors, offsets)
            for name, tensor in tensors.items():
                shared[name].copy_(tensor)
        comm.barrier()
        if local_rank != 0:
            path = next(p for p in candidates if p.exists())
            shared = _map(path, max(total, 1), tensors, offsets)
        comm.barrier()
    finally:
        if local_rank == 0:
            path.unlink(missing_ok=True)
    return shared


def _has_room(folder: Path, num_bytes: int) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > num_bytes


def _map(path: Path, total: int, tensors: Mapping[str, Tensor], offsets: Mapping[str, int]) -> dict[str, Tensor]:
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total)
    return {
        name: torch.empty(0, dtype=t.dtype).set_(
            storage, offsets[name] // t.element_size(), t.shape, t.contiguous().stride()
        )
        for name, t in tensors.items()
    }


def _assign(module: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Put shared tensors in the place of parameters and buffers; what was tied stays tied."""
    parameters = {
        id(p): nn.Parameter(shared[f"parameter {n}"], requires_grad=False) for n, p in module.named_parameters()
    }
    buffers = {id(b): shared[f"buffer {n}"] for n, b in module.named_buffers()}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = parameters[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffers[id(buffer)]
