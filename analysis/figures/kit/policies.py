"""Which systems are policies of this runtime's own layer, so that nothing but their plan differs."""

from __future__ import annotations

from dataclasses import replace

from analysis.figures.kit.base import FigureData

#: Policies that stand for another software with a layer, or a placement, of its own.
OTHER_SOFTWARE = ("deepspeed_moe", "deepspeed_moe_drop", "fastmoe", "fastermoe", "exflow")


def policies_only(data: FigureData) -> FigureData:
    """Leave out the systems that stand for other software."""
    others = {
        name for run in data.runs for name, system in run.systems.items() if system["policy"] in OTHER_SOFTWARE
    } | {name for name in data.summary["system"] if name in OTHER_SOFTWARE}
    return replace(data, summary=data.summary[~data.summary["system"].isin(others)])
