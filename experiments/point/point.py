"""One point of an experiment in its checked form, which everything that runs it works with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.datasets.base import Dataset
from experiments.point.options import GpuSharing, Options
from experiments.point.simulator_options import SimulatorOptions
from experiments.point.source import component_digest
from experiments.routers.base import Router, RoutingRequest
from harmoeny.choices import PLAN_EXECUTOR, Exchange
from harmoeny.hardware import Hardware
from harmoeny.models.base import ModelConfig
from harmoeny.policy import Policy
from harmoeny.runtime.device import best_device_type
from harmoeny.runtime.layer.plan_executor import find_executor
from results_schema.manifest import NOT_MEASURED

#: What stays out while it has this value, so that runs of earlier versions keep their names.
_UNNAMED: dict[str, Any] = {
    "exchange": Exchange.AUTO, "ranks_per_gpu": 1, "gpu_sharing": GpuSharing.MPS,
    "until": None, "max_rounds": None, "max_minutes": None, "spare_slots": None,
    "num_slots": None, "host_threads": 0,
}  # fmt: skip
#: Fields of the hardware of which the same is true, with the value that they have by default.
_UNNAMED_HARDWARE = (
    "kernel", "expert_tile_rows", "expert_half_rate_width", "round_spread", "rank_spread", "link_factor",
    "host_flops_per_s", "host_weights_bytes_per_s", "host_launch_s", "cache_bytes", "puts", "device_sharing",
    "early_s",
)  # fmt: skip
#: Options of routers of which the same is true.
_UNNAMED_ROUTER = {"adapt": False, "sharpness": None, "drift": None}
#: Options of requests of which the same is true.
_UNNAMED_REQUESTS = {"cv": None, "output_tokens": 1, "rate_step": None, "max_rates": 10}
#: Options of systems of which the same is true.
_UNNAMED_SYSTEM = {"spread": True, "host": True, "ahead": True}
#: Options of models of which the same is true.
_UNNAMED_MODEL = {"num_shared_experts": 0, "route_shared": False}
#: With ``until`` and no ``max_rounds``, so many times ``rounds`` are measured at most.
_MOST_TIMES = 5
#: Values that real ranks never read; ``backend`` is among them so that the default changes no run's name.
_SIMULATOR_ONLY = ("backend", "simulator")
_DEFAULT_HARDWARE = Hardware()


@dataclass(frozen=True)
class Point:
    """One point of an experiment, checked and ready to run; it pickles, so that ranks get it as it is.

    Attributes:
        options: the typed configuration.
        simulated: whether the backend predicts for the hardware that is described, and needs no ranks.
        model: builds the model.
        dataset: gives the text.
        router: decides where tokens go.
        hardware: what is known of the machine.
        simulator: what else a simulation needs.
        systems: policies by name, in the order of the configuration.
    """

    options: Options
    simulated: bool
    model: ModelConfig
    dataset: Dataset
    router: Router
    hardware: Hardware
    simulator: SimulatorOptions
    systems: dict[str, Policy]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data: what ``config.yaml`` holds and the run's identity is made of."""
        return asdict(self.options)

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return best_device_type() if self.options.device == "auto" else self.options.device

    @property
    def reads_text(self) -> bool:
        """Whether anybody asks for the data set's tokens: a simulation does only for the model's own routing."""
        return not self.simulated or self.router.from_model

    @property
    def dataset_name(self) -> str:
        """Name of the data set that the routing comes from: of a replayed one, the one that it was recorded on."""
        return self.router.recorded_on() or self.dataset.name

    @property
    def routing_remark(self) -> str:
        """How tokens are routed other than asked for, in one line; empty: they are not."""
        if self.router.from_model or self.router.recorded_on() is not None:
            return ""
        num_tokens = self.options.batch_size * self.options.seq_len
        return self.router.remark(self.routing_request(batch=0, layer=0, rank=0, num_tokens=num_tokens))

    def routing_request(
        self, *, batch: int, layer: int, rank: int, num_tokens: int, num_layers: int | None = None
    ) -> RoutingRequest:
        """Return what the router is asked for one rank's share of a batch in one MoE layer.

        Args:
            batch: index of the batch.
            layer: MoE layer in order of execution; those of decode steps follow those of the prompt.
            rank: whose tokens.
            num_tokens: tokens of the rank.
            num_layers: MoE layers of the model; None: no step after the prompt is asked for.
        """
        return RoutingRequest(
            num_tokens=num_tokens,
            num_experts=self.model.num_experts,
            top_k=self.model.top_k,
            batch=batch,
            layer=layer,
            rank=rank,
            seed=self.options.seed,
            world_size=self.options.world_size,
            num_layers=num_layers,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that all ranks read: of the measured batches, of those to learn from, and of one to warm up on."""
        o = self.options
        return (self.most_rounds + self.calibration_batches + 1) * o.world_size * o.batch_size * o.seq_len

    def _identity_of(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a system's options names the run."""
        unnamed = _UNNAMED_SYSTEM | {"num_stages": type(self.systems[name]).num_stages}
        return {k: v for k, v in options.items() if k not in unnamed or v != unnamed[k]}

    @property
    def most_rounds(self) -> int:
        """Rounds that are measured, at most: with ``until`` more than were asked for."""
        options = self.options
        if options.until is None:
            return options.rounds
        return options.max_rounds or _MOST_TIMES * options.rounds

    @property
    def calibration_batches(self) -> int:
        """Batches that systems learn from before any is measured."""
        return max((policy.calibration_batches for policy in self.systems.values()), default=0)

    @cached_property
    def run_id(self) -> str:
        """Name of the run's folder: readable labels and a digest of everything that the measurement depends on.

        The data set counts by its text, wherever that lies; other files that a run reads count by their content too.
        What does not belong to the question but to who answers it is in the manifest: see ``is_done``.
        """
        given = {k: v for k, v in self.config.items() if k not in NOT_MEASURED}
        identity = {k: v for k, v in given.items() if k not in _UNNAMED or v != _UNNAMED[k]}
        identity["hardware"] = {
            k: v
            for k, v in given["hardware"].items()
            if k not in _UNNAMED_HARDWARE or v != getattr(_DEFAULT_HARDWARE, k)
        }
        identity["systems"] = {name: self._identity_of(name, options) for name, options in given["systems"].items()}
        identity["model"] = {
            k: v for k, v in given["model"].items() if k not in _UNNAMED_MODEL or v != _UNNAMED_MODEL[k]
        }
        identity["router"] = {
            k: v for k, v in given["router"].items() if k not in _UNNAMED_ROUTER or v != _UNNAMED_ROUTER[k]
        }
        requests = {
            k: v for k, v in given["requests"].items() if k not in _UNNAMED_REQUESTS or v != _UNNAMED_REQUESTS[k]
        }
        identity["requests"] = requests
        if self.options.requests.rate_step is not None:  # limits say which rates are measured
            identity["slo"] = self.config["slo"]
        identity |= {"device": self.device_type, "dataset": [self.dataset.name, self.dataset.fingerprint()]}
        contents = {
            "routing": self.router.fingerprint(),
            "weights": self.model.fingerprint(),
            "arrivals": self.options.requests.fingerprint(),
        }
        # What is empty stays out, so that runs of earlier versions keep their names.
        identity |= {name: digest for name, digest in contents.items() if digest}
        if self.simulated:  # what is known of other systems' software decides nothing
            software = {k: v for k, v in given["simulator"]["software"].items() if k in self.systems}
            identity["simulator"] = given["simulator"] | {"software": software}
        else:
            identity = {k: v for k, v in identity.items() if k not in _SIMULATOR_ONLY}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        labels = [
            f"{k.removeprefix('router.')}={v}"
            for k, v in self.labels().items()
            if k not in ("router", "router.path", "router.optional") and v is not None and v is not False
        ]
        simulated = [f"on-{self.hardware.name}"] if self.simulated else []
        parts = [*simulated, self.router.name, *labels, self.options.tag, digest]
        return "-".join(str(part) for part in parts if part)

    def sources(self) -> dict[str, str]:
        """Return digests of code that users write: every policy with its executor, router, model, data set."""
        o = self.options
        digests = {
            f"systems.{name}": component_digest(policy, Policy, [*_targets(o.systems.get(name)), *_executor_of(policy)])
            for name, policy in self.systems.items()
        }
        digests["router"] = component_digest(self.router, Router, _targets(o.router))
        digests["model"] = component_digest(self.model, ModelConfig, _targets(o.model))
        if self.reads_text:
            digests["dataset"] = component_digest(self.dataset, Dataset, _targets(o.dataset))
        return {name: digest for name, digest in digests.items() if digest}

    def inputs(self) -> dict[str, str]:
        """Return digests of the files that policies read, or have written for the next run to read."""
        digests = {f"systems.{name}": policy.fingerprint() for name, policy in self.systems.items()}
        return {name: digest for name, digest in digests.items() if digest}

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.options.results_dir, self.options.experiment, self.run_id)

    def labels(self) -> dict[str, Any]:
        """Return what tells this point from its neighbours: the router and its options."""
        options = {f"router.{k}": v for k, v in self.options.router.items() if k != "_target_"}
        return {"router": self.router.name, **options}


def _targets(node: Any) -> list[str]:
    """Return the modules that make a component and what it is made of, such as that of a function of the user's."""
    if isinstance(node, Mapping):
        parts = str(node.get("_target_", "")).split(".")
        modules = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in sys.modules]
        return [*modules[:1], *(name for value in node.values() for name in _targets(value))]
    return [name for value in node for name in _targets(value)] if isinstance(node, list | tuple) else []


def _executor_of(policy: Policy) -> list[str]:
    return [] if policy.executor == PLAN_EXECUTOR else [find_executor(policy.executor).__module__]
