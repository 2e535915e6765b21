"""Where every rank's time goes in a MoE layer: its phases, with waiting for weights and idling told apart."""

from __future__ import annotations

import pandas as pd

#: Parts of a layer in the order in which they are drawn; together they are the layer.
PARTS = ("route", "metadata", "plan", "dispatch", "compute", "wait for weights", "idle", "combine")


def breakdown(layers: pd.DataFrame) -> pd.DataFrame:
    """Divide the time of a layer into :data:`PARTS`.

    Args:
        layers: rows of ``layers.parquet``.

    Returns:
        Columns ``system``, ``rank`` and per part ``<part>_s``, in seconds per layer: medians over rounds of means over
        layers.
    """
    waits = layers["fetch_wait_s"] + layers["restore_wait_s"]
    parts = pd.DataFrame(
        {
            **{phase: layers[f"{phase}_s"] for phase in ("route", "metadata", "plan", "dispatch")},
            "compute": layers["compute_s"] - waits,
            "wait for weights": waits,
            # A rank that has finished its own computation idles in combine, until the last rank joins it.
            "idle": layers[["idle_s", "combine_s"]].min(axis=1),
            "combine": (layers["combine_s"] - layers["idle_s"]).clip(lower=0),
        }
    )[list(PARTS)]
    keys = [layers[key] for key in ("system", "round", "rank")]
    by_round = parts.groupby(keys, sort=False).mean()
    return by_round.groupby(["system", "rank"], sort=False).median().add_suffix("_s").reset_index()
