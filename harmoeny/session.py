"""The library's way in: puts a system behind the MoE layers of a model that the user has."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from harmoeny.budget import Budget, parse_bytes
from harmoeny.choices import Exchange
from harmoeny.hardware import Hardware
from harmoeny.models.base import DTYPES, AdaptedModule, MoEBlock
from harmoeny.models.kit.experts_interface import AdaptedExperts, is_bound, register_implementation
from harmoeny.models.kit.loading import build_module, load_config
from harmoeny.models.kit.modules import device_of
from harmoeny.models.switch import AdaptedSwitch, is_switch
from harmoeny.policy import Policy
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.links import make_transfers
from harmoeny.runtime.memory.sharing import rank_on_host, ranks_on_host, share_model, share_tensors
from harmoeny.runtime.memory.transfer import Transfers
from harmoeny.runtime.start import start_rank
from harmoeny.timed import HarMoEny

#: What gives the weights back, for people.
_CLOSE, _DETACH = "session.close()", "harmoeny.detach(model)"
#: Where experts that were attached by name keep their session, which nobody else has.
_OWN_SESSION = "_harmoeny_session"


class Session:
    """A model whose MoE layers run expert-parallel over the ranks of the default process group, or on one rank alone.

    All ranks create it, use it and run the model together, each on its own tokens: every rank has to run the same
    number of forward passes, since the ranks exchange tokens in every MoE layer. A context manager that closes itself.

    Attributes:
        model: the model, ready to be called.
        engine: executes its MoE layers.
        choice: what was chosen for the memory that :func:`load` was given, in words; empty: nothing was to be chosen.
    """

    def __init__(
        self,
        adapted: AdaptedModule,
        policy: Policy,
        exchange: str = Exchange.AUTO,
        transfers: Transfers | None = None,
        way_out: str = _CLOSE,
        host_threads: int = 0,
    ) -> None:
        """Use :func:`attach` or :func:`load`.

        Args:
            adapted: the model.
            policy: decides.
            exchange: how tokens travel.
            transfers: copies experts; None: its own.
            way_out: what gives the weights back, for people.
            host_threads: threads that execute experts beside the device; 0: none do.

        Raises:
            ValueError: the model's layers are not supported, or the exchange is not possible here.
        """
        try:
            adapted.check()
        except ValueError:
            adapted.restore()
            raise
        self.model: Any = adapted.module
        self._adapted = adapted
        comm = Communicator(adapted.device)
        try:
            self.engine = start_rank(
                adapted.experts, comm, exchange=exchange, transfers=transfers, host_threads=host_threads, record=False
            )
        except BaseException:
            adapted.restore()
            raise
        adapted.context.engine = self.engine
        self.choice = ""
        self._guards = _guard(adapted, way_out)
        self.use(policy)

    def use(self, policy: Policy) -> None:
        """Let another policy decide from the next forward pass on.

        Raises:
            ValueError: it is no policy, or an option of it is wrong.
        """
        _check_policy(policy)
        self.engine.finish()
        self.engine.use(self.engine.build_system(policy.name, policy.calibrated(self.engine.memory.cost)))

    def close(self) -> None:
        """Give the MoE layers and their weights back to the model, which is then as it was on this rank."""
        for guard in self._guards:
            guard.remove()
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

    A model with that implementation works at once: every layer of experts is attached when it first runs, and
    :func:`detach` gives the weights back. For another policy later, :func:`detach` the model and :func:`attach` it.

    Args:
        policy: decides for models that were not attached; HarMoEny if None.

    Raises:
        ValueError: an option of the policy is wrong.
    """
    default = policy or HarMoEny()
    _check_policy(default)

    def attach_alone(experts: nn.Module) -> None:
        with torch.no_grad():
            # Layers come one by one, each with a session: with puts every one of them would have windows of its own.
            session = _attach(
                AdaptedExperts(experts), default, Exchange.COLLECTIVE, _transfers(device_of(experts)), _DETACH
            )
        experts.__dict__[_OWN_SESSION] = session

    register_implementation(attach_alone)


def detach(model: nn.Module) -> None:
    """Give a model the weights back of all layers that were attached by name; its own code computes them from then on.

    Args:
        model: one that ran with ``experts_implementation="harmoeny"``; sessions of :func:`attach` and :func:`load` are
            closed by ``session.close()``.

    Raises:
        ValueError: no layer of it was attached by name.
    """
    sessions = [own for module in model.modules() if (own := module.__dict__.pop(_OWN_SESSION, None)) is not None]
    if not sessions:
        raise ValueError(
            f"{type(model).__name__} has no layer that harmoeny.register attached; session.close() ends a session of "
            "attach or load"
        )
    for session in sessions:
        session.close()


def attach(model: nn.Module, policy: Policy | None = None, *, exchange: str = Exchange.AUTO) -> Session:
    """Put a policy behind the MoE layers of a model; all ranks call it together, with the same weights.

    The ranks of a host keep one copy of the experts, in host memory; everything else stays as it is, on every rank.

    Args:
        model: with experts behind Transformers' experts interface, or a Switch Transformer.
        policy: HarMoEny if None.
        exchange: how tokens travel between ranks: ``collective``, ``put`` (straight into the receiver's memory), or
            ``auto``, which is ``put`` where that is possible.

    Raises:
        ValueError: the model has no such layers, is attached already, or they are laid out in a way that is not
            supported; an option of the policy is wrong; the exchange is not possible here.
    """
    policy = policy or HarMoEny()
    _check_policy(policy)
    _check_exchange(exchange)
    _check_free(model)
    with torch.no_grad():
        return _attach(AdaptedSwitch(model) if is_switch(model) else AdaptedExperts(model), policy, exchange)


def load(
    path: str | Path,
    policy: Policy | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    device_memory: str | int | None = None,
    host_threads: int | None = None,
    exchange: str = Exchange.AUTO,
) -> Session:
    """Load a saved model and put a policy behind its MoE layers; all ranks call it together.

    Weights are read once per host, by its first rank, into memory that all its ranks share.

    Args:
        path: a folder with ``config.json`` and weights in safetensors files.
        policy: HarMoEny if None.
        dtype: ``float32`` or ``bfloat16``.
        device: where the model computes; experts stay in host memory and are copied from there.
        device_memory: what the model may take of the device, in bytes or as ``8GiB``: then HarMoEny has as many slots
            for experts as fit beside the other weights, says so, and fetches the others, or leaves them to the host.
            None: as many experts are on a device as its policy says.
        host_threads: threads of a rank's host that execute experts; None: of all there are, where ``device_memory`` has
            not room for all experts of a rank, else none.
        exchange: as in :func:`attach`.

    Raises:
        ValueError: the folder has no such model, the model or policy is not supported, or the exchange is not possible.
    """
    if policy is not None and device_memory is not None:
        raise ValueError(f"device_memory: {device_memory!r}, must be None with a policy, which says what it holds")
    if host_threads is not None and host_threads < 0:
        raise ValueError(f"host_threads: {host_threads}, must be at least 0")
    device_bytes = None if device_memory is None else parse_bytes(device_memory)
    policy = policy or HarMoEny()
    _check_policy(policy)
    _check_exchange(exchange)
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
        if device_bytes is None:
            return Session(adapted, policy, exchange, host_threads=host_threads or 0)
        return _load_within(adapted, comm, device_bytes, host_threads, exchange)


def _load_within(
    adapted: AdaptedModule, comm: Communicator, device_bytes: int, host_threads: int | None, exchange: str
) -> Session:
    """Start a session of a loaded model with so much memory on every rank's device."""
    module, layers = adapted.module, adapted.experts
    budget = Budget(
        device_bytes=device_bytes,
        other_bytes=sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())),
        slot_bytes=sum(layer.expert_bytes for layer in layers),
        num_layers=len(layers),
        num_experts=max(layer.num_experts for layer in layers),
        world_size=comm.world_size,
    )
    try:
        policy = budget.policy()
    except ValueError:
        adapted.restore()
        raise
    if host_threads is None:
        host_threads = budget.host_threads(comm.device, ranks_on_host(comm))
    session = Session(adapted, policy, exchange, host_threads=host_threads)
    session.choice = budget.describe(session.engine.memory.cost, host_threads)
    if comm.rank == 0:
        print(session.choice, file=sys.stderr)
    return session


def _check_free(model: nn.Module) -> None:
    """Refuse a model of which harmoeny executes a layer already."""
    name = type(model).__name__
    if any(_OWN_SESSION in module.__dict__ for module in model.modules()):
        raise ValueError(f"{name} is attached already, by harmoeny.register: call {_DETACH} first")
    if any(isinstance(module, MoEBlock) or is_bound(module) for module in model.modules()):
        raise ValueError(
            f"{name} is attached already: call session.close() first, or let another policy decide by "
            "session.use(policy)"
        )


def _check_policy(policy: object) -> None:
    if not isinstance(policy, Policy):
        raise ValueError(f"policy: {policy!r}, must be a policy, such as harmoeny.HarMoEny(), and not its name")
    policy.validate()


def _check_exchange(exchange: str) -> None:
    if exchange not in tuple(Exchange):
        raise ValueError(f"exchange: {exchange!r}, must be one of {', '.join(Exchange)}")


def _guard(adapted: AdaptedModule, way_out: str) -> list[RemovableHandle]:
    """Let modules without their experts' weights refuse to be saved, which would leave these out without a word."""

    def refuse(module: nn.Module, *_: object) -> None:
        raise RuntimeError(
            f"{type(module).__name__} cannot be saved while harmoeny holds its weights: {way_out} gives them back"
        )

    return [bare.register_state_dict_pre_hook(refuse) for bare in adapted.bare]  # type: ignore[no-untyped-call]


def _attach(
    adapted: AdaptedModule,
    policy: Policy,
    exchange: str,
    transfers: Transfers | None = None,
    way_out: str = _CLOSE,
) -> Session:
    """Share the experts of a model that every rank has, and start a session."""
    comm = Communicator(adapted.device)
    for layer in adapted.experts:
        layer.weights.update({name: w.to("cpu") for name, w in layer.weights.items()})
    if comm.world_size > 1:
        named = {f"{i} {name}": w for i, layer in enumerate(adapted.experts) for name, w in layer.weights.items()}
        shared = share_tensors(named, comm, rank_on_host(comm))
        for i, layer in enumerate(adapted.experts):
            layer.weights.update({name: shared[f"{i} {name}"] for name in layer.weights})
    return Session(adapted, policy, exchange, transfers, way_out)


@cache
def _transfers(device: torch.device) -> Transfers:
    """Return what copies experts for all layers that were attached when they first ran."""
    return make_transfers(device, Hardware())
