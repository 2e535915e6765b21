"""The schema of the configuration, for Hydra and for everything that reads a point."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cache
from typing import Any, cast

from omegaconf import MISSING, OmegaConf

from experiments.point.copies import Copies
from experiments.point.request_options import RequestOptions


class GpuSharing(StrEnum):
    """How several ranks run on one GPU: at the same time under an MPS daemon, each on its SMs, or by turns."""

    MPS = "mps"
    TIME_SLICED = "time_sliced"


@dataclass
class WandbOptions:
    """Logging to Weights & Biases."""

    mode: str = "offline"
    project: str = "harmoeny"


@dataclass
class TraceOptions:
    """Recording of the routing."""

    record: str | None = None
    token_paths: bool = False


@dataclass
class SloOptions:
    """Limits that a request must keep; conf/config.yaml says what the values mean."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    share: float = 0.9

    @property
    def limits(self) -> dict[str, float]:
        """The limits that there are, by name."""
        found = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in found.items() if limit is not None}

    def validate(self) -> None:
        """Check the limits.

        Raises:
            ValueError: one that is not above 0, or a share that is none.
        """
        for name, value in self.limits.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"slo.{name}: {value}, must be a number above 0, or null")
        if not 0 < self.share < 1:
            raise ValueError(f"slo.share: {self.share}, must be above 0 and below 1: 0.9 for 90 % of the requests")


@dataclass
class Options:
    """Schema of the configuration; conf/config.yaml holds the values and says what they mean.

    Components (``model`` to ``systems``) are configuration nodes here; a point has what was built of them.
    """

    experiment: str = MISSING
    tag: str = MISSING
    seed: int = MISSING
    world_size: int = MISSING
    backend: str = MISSING
    device: str = MISSING
    results_dir: str = MISSING
    force: bool = MISSING
    dry_run: bool = MISSING
    batch_size: int = MISSING
    seq_len: int = MISSING
    rounds: int = MISSING
    warmup_rounds: int = MISSING
    until: float | None = None
    max_rounds: int | None = None
    max_minutes: float | None = None
    timeout_s: int = MISSING
    spare_slots: int | None = None
    num_slots: int | None = None
    host_threads: int = 0
    exchange: str = MISSING
    ranks_per_gpu: int = MISSING
    gpu_sharing: str = MISSING
    requests: RequestOptions = field(default_factory=RequestOptions)
    decode_tokens: int = MISSING
    slo: SloOptions = field(default_factory=SloOptions)
    trace: TraceOptions = field(default_factory=TraceOptions)
    model: Any = MISSING
    dataset: Any = MISSING
    router: Any = MISSING
    hardware: Any = MISSING
    simulator: Any = MISSING
    systems: dict[str, Any] = field(default_factory=dict)
    wandb: WandbOptions = field(default_factory=WandbOptions)

    @property
    def num_decode_steps(self) -> int:
        """The most tokens after the first that a sequence gets."""
        return max(self.decode_tokens, self.requests.output_tokens - 1)


_COMPONENTS = ("model", "dataset", "router", "hardware", "simulator", "systems")


def make_options(values: Mapping[str, Any]) -> Options:
    """Return resolved values as typed options.

    Raises:
        OmegaConfBaseException: a field that is not known, or a value of another type.
    """
    # Components have schemas of their own; to merge them takes most of the time.
    components = {name: values[name] for name in _COMPONENTS if name in values}
    written = {name: (name, repr(value)) for name, value in values.items() if name not in components}
    if len(written) + len(components) < len(fields(Options)):  # what is not set has its default, or is missed
        options = _unset().copy()
        options.merge_with(dict(values) | {name: {} for name in components})
        return replace(cast(Options, OmegaConf.to_object(options)), **components)
    # Most fields are the same in all points of a sweep.
    if new := [name for name, key in written.items() if key not in _TYPED]:
        options = _unset().copy()
        options.merge_with({name: values[name] for name in new})
        _TYPED.update({written[name]: _plain(options[name]) for name in new})
    return Options(**{name: copy.copy(_TYPED[key]) for name, key in written.items()}, **components)


#: Values of single fields, of their types, by the field and how they were written.
_TYPED: dict[tuple[str, str], Any] = {}


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


@cache
def _unset() -> Copies:
    return Copies(OmegaConf.structured(Options))
