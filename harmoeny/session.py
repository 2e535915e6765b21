"""The library's way in: puts a system behind the MoE layers of a model that the user has."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from harmoeny.hardware import Hardware
from harmoeny.models.base import DTYPES, AdaptedModule, device_of
from harmoeny.models.kit.experts_interface import AdaptedExperts, register_implementation
from harmoeny.models.kit.loading import build_module, load_config
from harmoeny.models.switch import AdaptedSwitch, is_switch
from harmoeny.policy import Policy
from harmoeny.rebalance import HarMoEny
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.sharing import rank_on_host, share_model, share_tensors
from harmoeny.runtime.memory.transfer import Transfers, make_transfers
from harmoeny.runtime.start import start_rank


class Session:
    """A model whose MoE layers run expert-parallel over the ranks of the default process group, or on one rank alone.

    All ranks create it, use it and run the model together, each on its own tokens: every rank has to run the same
    number of forward passes, since the ranks exchange tokens in every MoE layer. A context manager that closes itself.

    Attributes:
        model: the model, ready to be called.
        engine: executes its MoE layers.
    """

    def __init__(self, adapted: AdaptedModule, policy: Policy, transfers: Transfers | None = None) -> None:
        """Use :func:`attach` or :func:`load`."""
        try:
            adapted.check()
        except ValueError:
            adapted.restore()
            raise
        self.model: Any = adapted.module
        self._adapted = adapted
        self.engine = start_rank(adapted.experts, Communicator(adapted.device), transfers=transfers, record=False)
        adapted.context.engine = self.engine
        self.use(policy)

    def use(self, policy: Policy) -> None:
        """Let another policy decide from the next forward pass on.

        Raises:
            ValueError: an option of the policy is wrong.
        """
        policy.validate()
        self.engine.finish()
        self.engine.use(self.engine.build_system(policy.name, policy.calibrated(self.engine.memory.cost)))

    def close(self) -> None:
        """Give the MoE layers and their weights back to the model, which is then as it was on this rank."""
        self.engine.close()
        self._adapted.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def register(policy: Policy | None = None) -> None:
    """Make ``experts_implementation="harmoeny"`` known to Transformers.

    A model with that implementation works at once: every layer of experts is attached when it first runs. For another
    policy later, or to have the weights back, use :func:`attach`, which says so explicitly.

    Args:
        policy: decides for models that were not attached; HarMoEny if None.

    Raises:
        ValueError: an option of the policy is wrong.
    """
    default = policy or HarMoEny()
    default.validate()

    def attach_alone(experts: nn.Module) -> None:
        with torch.no_grad():
            _attach(AdaptedExperts(experts), default, _transfers(device_of(experts)))

    register_implementation(attach_alone)


def attach(model: nn.Module, policy: Policy | None = None) -> Session:
    """Put a policy behind the MoE layers of a model; all ranks call it together, with the same weights.

    The ranks of a host keep one copy of the experts, in host memory; everything else stays as it is, on every rank.

    Args:
        model: with experts behind Transformers' experts interface, or a Switch Transformer.
        policy: HarMoEny if None.

    Raises:
        ValueError: the model has no such layers, or they are laid out in a way that is not supported; an option of the
            policy is wrong.
    """
    policy = policy or HarMoEny()
    policy.validate()
    with torch.no_grad():
        return _attach(AdaptedSwitch(model) if is_switch(model) else AdaptedExperts(model), policy)


def load(
    path: str | Path, policy: Policy | None = None, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> Session:
    """Load a saved model and put a policy behind its MoE layers; all ranks call it together.

    Weights are read once per host, by its first rank, into memory that all its ranks share.

    Args:
        path: a folder with ``config.json`` and weights in safetensors files.
        policy: HarMoEny if None.
        dtype: ``float32`` or ``bfloat16``.
        device: where the model computes; experts stay in host memory and are copied from there.

    Raises:
        ValueError: the folder has no such model, or the model or policy is not supported.
    """
    policy = policy or HarMoEny()
    policy.validate()
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}, must be one of {', '.join(DTYPES)}")
    config = load_config(Path(path))
    comm = Communicator(torch.device(device))
    local_rank = rank_on_host(comm)
    with torch.no_grad():
        module = build_module(config, Path(path), DTYPES[dtype], on_meta=local_rank > 0)
        adapted = AdaptedSwitch(module) if is_switch(module) else AdaptedExperts(module)
        share_model(adapted, comm, local_rank)
        module.to(comm.device)
        adapted.device = comm.device
        return Session(adapted, policy)


def _attach(adapted: AdaptedModule, policy: Policy, transfers: Transfers | None = None) -> Session:
    """Share the experts of a model that every rank has, and start a session."""
    comm = Communicator(adapted.device)
    for layer in adapted.experts:
        layer.weights.update({name: w.to("cpu") for name, w in layer.weights.items()})
    if comm.world_size > 1:
        named = {f"{i} {name}": w for i, layer in enumerate(adapted.experts) for name, w in layer.weights.items()}
        shared = share_tensors(named, comm, rank_on_host(comm))
        for i, layer in enumerate(adapted.experts):
            layer.weights.update({name: shared[f"{i} {name}"] for name in layer.weights})
    return Session(adapted, policy, transfers)


@cache
def _transfers(device: torch.device) -> Transfers:
    """Return what copies experts for all layers that were attached when they first ran."""
    return make_transfers(device, Hardware())
