"""The configuration of one point: its schema for Hydra, and its checked form that everything else works with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from experiments.datasets.base import Dataset
from experiments.point.request_options import RequestOptions
from experiments.point.simulator_options import SimulatorOptions
from experiments.routers.base import Router
from harmoeny.hardware import Hardware
from harmoeny.models.base import ModelConfig
from harmoeny.policy import Policy

#: Values that change where results go or what is done with them, but not the measurement.
_NOT_IDENTITY = ("experiment", "results_dir", "wandb", "timeout_s", "trace")
#: Values that real ranks never read; ``backend`` is among them so that the default changes no run's name.
_SIMULATOR_ONLY = ("backend", "simulator")


@dataclass(frozen=True)
class Point:
    """One point of an experiment, checked and ready to run.

    Attributes:
        values: the resolved configuration as plain data.
        model: builds the model.
        dataset: gives the text.
        router: decides where tokens go.
        hardware: what is known of the machine.
        simulator: what else a simulation needs.
        systems: policies by name, in the order of the configuration.
    """

    values: dict[str, Any]
    model: ModelConfig
    dataset: Dataset
    router: Router
    hardware: Hardware
    simulator: SimulatorOptions
    systems: dict[str, Policy]

    def __getitem__(self, name: str) -> Any:
        """Return a top-level value of the configuration."""
        return self.values[name]

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        if self["device"] != "auto":
            return str(self["device"])
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def requests(self) -> RequestOptions:
        """How requests come in."""
        return RequestOptions(**self["requests"])

    @property
    def reads_text(self) -> bool:
        """Whether anybody asks for the data set's tokens: a simulation does only for the model's own routing."""
        return self["backend"] == "ranks" or self.router.from_model

    @property
    def num_tokens(self) -> int:
        """Tokens that all ranks read: those of the measured batches, then those of batches to learn from."""
        learned = max((policy.calibration_batches for policy in self.systems.values()), default=0)
        batches = int(self["rounds"]) + learned
        return batches * int(self["world_size"]) * int(self["batch_size"]) * int(self["seq_len"])

    @cached_property
    def run_id(self) -> str:
        """Name of the run's folder: readable labels and a digest of everything that the measurement depends on.

        The data set counts by its text, wherever that lies.
        """
        identity = {k: v for k, v in self.values.items() if k not in _NOT_IDENTITY}
        identity |= {"device": self.device_type, "dataset": [self.dataset.name, self.dataset.fingerprint()]}
        if routing := self.router.fingerprint():
            identity["routing"] = routing
        if self["backend"] == "ranks":
            identity = {k: v for k, v in identity.items() if k not in _SIMULATOR_ONLY}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        labels = [
            f"{k.removeprefix('router.')}={v}"
            for k, v in self.labels().items()
            if k not in ("router", "router.path", "router.optional") and v is not None and v is not False
        ]
        simulated = [f"on-{self.hardware.name}"] if self["backend"] == "simulator" else []
        parts = [*simulated, self.router.name, *labels, self["tag"], digest]
        return "-".join(str(part) for part in parts if part)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(str(self["results_dir"]), str(self["experiment"]), self.run_id)

    def labels(self) -> dict[str, Any]:
        """Return what tells this point from its neighbours: the router and its options."""
        options = {f"router.{k}": v for k, v in self["router"].items() if k != "_target_"}
        return {"router": self.router.name, **options}
