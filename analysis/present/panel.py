"""How figures name and scale the quantities of `analysis.data.metrics`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from analysis.data.metrics import QUANTITIES

#: From a quantity's unit to the one that it is drawn in.
_SCALES = {
    ("tokens/s", "1,000 tokens/s"): 1e-3,
    ("s", "ms"): 1e3,
    ("", "%"): 100.0,
    ("", "max / mean"): 1.0,
}


@dataclass(frozen=True)
class Panel:
    """A quantity as it is drawn.

    Attributes:
        column: of a summary, with its ``_low`` and ``_high``.
        name: for people.
        unit: that it is drawn in; empty for ratios and numbers of events.
        better: direction in which it is better, ``higher`` or ``lower``.
        scale: factor from the column to what is drawn.
    """

    column: str
    name: str
    unit: str
    better: str
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def title(self) -> str:
        """Name, unit and direction, for above a panel."""
        return f"{self.label}, {self.better} is better"

    def renamed(self, name: str) -> Panel:
        """Return the panel under a more telling name."""
        return replace(self, name=name)


def panel(column: str, unit: str | None = None) -> Panel:
    """Return the panel of a quantity.

    Args:
        column: its name in `analysis.data.metrics.QUANTITIES`.
        unit: that it is drawn in; None: its own.

    Raises:
        KeyError: there is no such quantity, or it cannot be drawn in this unit.
    """
    quantity = QUANTITIES[column]
    if unit is None or unit == quantity.unit:
        return Panel(column, quantity.title, quantity.unit, quantity.better)
    return Panel(column, quantity.title, unit, quantity.better, _SCALES[quantity.unit, unit])


THROUGHPUT = panel("throughput_tokens_per_s", "1,000 tokens/s")
TTFT = panel("ttft_s")
TTFT_PER_SEQUENCE = panel("ttft_ms_per_sequence")
IDLE_SHARE = panel("idle_share", "%")
IMBALANCE = panel("imbalance", "max / mean")
RATIO_TO_BEST_BASELINE = panel("throughput_ratio_to_best_baseline")
RATIO_TO_NO_SKEW = panel("throughput_ratio_to_no_skew")
