"""Options of the simulator: what the software under test costs beside the work that the hardware does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from omegaconf import OmegaConf

from harmoeny.models.base import DTYPES

#: What a plan's time is a sum of, each times the number that a plan has of it.
PLAN_TERMS = (
    "plan_s", "plan_entry_s", "plan_step_s", "plan_cell_s", "plan_moving_s", "plan_copies_s", "plan_stages_s",
)  # fmt: skip


@dataclass(kw_only=True)
class SoftwareCost:
    """What one system's implementation takes; the defaults are those of a runtime that costs nothing but planning.

    Attributes:
        layer_s: per MoE layer, whatever its tokens.
        token_s: per MoE layer and token of the rank.
        plan_s: per plan; null: the policy is timed on the machine that simulates.
        plan_entry_s: per plan and entry of its tokens, of which it has ranks * experts * ranks; 0 without ``plan_s``.
        plan_step_s: per step of a plan; it has as many as there are fetches (an expert on a rank that does not hold it)
            and ranks that drop tokens.
        plan_cell_s: per rank and expert; as the next three, 0 without ``plan_s``.
        plan_moving_s: likewise, of a plan that has steps.
        plan_copies_s: likewise, of a plan for experts of which ranks hold copies.
        plan_stages_s: likewise, of a plan in stages.
        padded: every expert is filled up to the largest number of assignments that any rank has for any expert, and
            tokens get to their places by a product with a matrix of zeros and ones (DeepSpeed, GShard).
        dtype: what it holds weights and hidden states in, computed at the same rates; null: the model's.
        capacity_limit: with ``padded``, the largest number that is filled up to; what is above is not executed.
    """

    layer_s: float = 0.0
    token_s: float = 0.0
    plan_s: float | None = None
    plan_entry_s: float = 0.0
    plan_step_s: float = 0.0
    plan_cell_s: float = 0.0
    plan_moving_s: float = 0.0
    plan_copies_s: float = 0.0
    plan_stages_s: float = 0.0
    padded: bool = False
    capacity_limit: int | None = None
    dtype: str | None = None

    def validate(self, name: str) -> None:
        """Check the values.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name.endswith("_s") and value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"simulator.software.{name}.{part.name}: {value}, must be a number of at least 0")
        for field_name in PLAN_TERMS:
            if self.plan_s is None and field_name != "plan_step_s" and getattr(self, field_name):
                raise ValueError(
                    f"simulator.software.{name}.{field_name}: {getattr(self, field_name)}, must be 0 without plan_s, "
                    "since the policy is timed then"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"simulator.software.{name}.dtype: {self.dtype!r}, must be one of {', '.join(DTYPES)}, or null"
            )
        if self.capacity_limit is not None and self.capacity_limit < 1:
            raise ValueError(
                f"simulator.software.{name}.capacity_limit: {self.capacity_limit}, must be at least 1, or null"
            )


@dataclass(kw_only=True)
class SimulatorOptions:
    """What ``backend=simulator`` needs beside the hardware.

    Attributes:
        software: by system; a system that is not named costs what :class:`SoftwareCost` has by default.
        batch_size: sequences per rank of single systems, in place of the experiment's own: a number, or one for every
            ``router.skew``, as where published systems ran out of memory.
    """

    software: dict[str, SoftwareCost] = field(default_factory=dict)
    batch_size: dict[str, Any] = field(default_factory=dict)

    def batch_size_of(self, system: str, default: int, skew: float | None) -> int:
        """Return a system's sequences per rank.

        Args:
            system: its name.
            default: the experiment's own.
            skew: the router's, None where it has none.

        Raises:
            ValueError: no size for this skew, or one below 1.
        """
        size = self.batch_size.get(system, default)
        if isinstance(size, Mapping):
            known = [value for key, value in size.items() if skew is not None and float(key) == skew]
            if not known:
                raise ValueError(f"simulator.batch_size.{system}: {dict(size)}, must have router.skew={skew}")
            size = known[0]
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"simulator.batch_size.{system}: {size!r}, must be at least 1")
        return size


def load_options(values: Mapping[str, Any]) -> SimulatorOptions:
    """Check the options of a configuration.

    Raises:
        ValueError: a field that is wrong, its value and what is allowed.
    """
    # Points of a sweep have the same ones, and to merge those of two dozen systems takes longest of all in a point.
    written = repr(values)
    if written not in _LOADED:
        if len(_LOADED) == _KEPT:
            _LOADED.clear()
        _LOADED[written] = _load_options(values)
    return _LOADED[written]


_LOADED: dict[str, SimulatorOptions] = {}
_KEPT = 100


def _load_options(values: Mapping[str, Any]) -> SimulatorOptions:
    merged = OmegaConf.merge(OmegaConf.structured(SimulatorOptions), values)
    options = cast(SimulatorOptions, OmegaConf.to_object(merged))
    for name, cost in options.software.items():
        cost.validate(name)
    return options
