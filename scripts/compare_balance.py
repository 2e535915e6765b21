"""Plan the routing that HarMoEny's authors recorded and compare the ranks' loads with those that they published.

Nothing is executed: every number is planned (by our policies) or published (loads of the authors' own runs).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from baselines.drop import Drop
from baselines.even_split import EvenSplit
from baselines.static_ep import StaticEP
from experiments.routing.authors_csv import read_published
from harmoeny.placement import IntArray
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from results_schema.atomic import write_text
from results_schema.printing import print_anything

REFERENCE = Path("../shared/reference/harmoeny-paper")
OUT = Path("results/published/balance_switch128.csv")
ROUTING = "expert_freq_switch128_datasets.csv"
LOADS = "gpu_balance_switch128_policy_datasets.csv"
WORLD_SIZE = 8
#: MoE layers from here on are the decoder's.
FIRST_DECODER_LAYER = 6
#: The threshold that the paper states; 1 moves tokens until the loads are even, whatever the fetches cost.
THRESHOLD = 1512
PLANNED: Mapping[str, Policy] = {
    "harmoeny": TokenHarMoEny(threshold=THRESHOLD),
    "harmoeny_paper_rule": TokenHarMoEny(threshold=THRESHOLD, stop_rule="paper"),
    "harmoeny_greedy": TokenHarMoEny(threshold=1, stop_rule="paper"),
    "static_ep": StaticEP(),
    "even_split": EvenSplit(),
    "drop": Drop(),
}
#: The authors' names; their "deepspeed" is the static placement here.
_PUBLISHED = {
    "harmony": "harmoeny", "deepspeed": "static_ep", "even_split": "even_split", "drop": "drop", "exflow": "exflow",
}  # fmt: skip


def compare(reference: Path) -> pd.DataFrame:
    """Return mean imbalances and fetches per data set, stack (encoder, decoder) and system.

    Args:
        reference: the folder with the authors' files.

    Returns:
        Columns ``dataset``, ``stack``, ``system``, ``source`` (published or planned), ``num_layers`` (batches x layers
        that the means are over), ``imbalance``, ``worst_imbalance``, ``fetches_per_layer`` (empty: not published).

    Raises:
        ValueError: a file is damaged.
        OSError: a file is not there.
    """
    loads = pd.read_csv(reference / LOADS)
    rows = pd.concat([_published(loads), *(_planned(reference, d) for d in loads["dataset"].unique())])
    rows["stack"] = np.where(rows["layer"] < FIRST_DECODER_LAYER, "encoder", "decoder")
    groups = rows.groupby(["dataset", "stack", "system", "source"], sort=False)
    table = groups.agg(
        num_layers=("imbalance", "size"),
        imbalance=("imbalance", "mean"),
        worst_imbalance=("imbalance", "max"),
        fetches_per_layer=("fetches", "mean"),
    )
    return table.round(6).reset_index().sort_values(
        ["dataset", "stack", "source", "system"], ascending=[True, False, False, True], ignore_index=True
    )  # fmt: skip


def _published(frame: pd.DataFrame) -> pd.DataFrame:
    ranks = frame[[str(rank) for rank in range(WORLD_SIZE)]]
    return pd.DataFrame(
        {
            "dataset": frame["dataset"],
            "layer": frame["layer_idx"],
            "system": frame["scheduling_policy"].map(_PUBLISHED),
            "source": "published",
            "imbalance": ranks.max(axis=1) / ranks.mean(axis=1),
            "fetches": np.nan,
        }
    )


def _planned(reference: Path, dataset: str) -> pd.DataFrame:
    trace = read_published(reference / ROUTING, dataset)
    rows = []
    for batch, layer in np.ndindex(trace.num_batches, trace.num_layers):
        counts: IntArray = trace.spread_counts(batch, layer, WORLD_SIZE)
        for name, policy in PLANNED.items():
            plan = policy.plan(counts, policy.place(layer, trace.num_experts, WORLD_SIZE))
            rows.append((dataset, layer, name, "planned", plan.imbalance(), plan.fetch.sum()))
    return pd.DataFrame(rows, columns=["dataset", "layer", "system", "source", "imbalance", "fetches"])


def main() -> int:
    """Compare and write the table; 0 where there is nothing to compare with."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_balance", description=__doc__)
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="the authors' files (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="table to write (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.reference.is_dir():
        print(f"skipped: {arguments.reference} does not exist, so there is nothing to compare with", file=sys.stderr)
        return 0
    try:
        table = compare(arguments.reference)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write_text(arguments.out, table.to_csv(index=False, lineterminator="\n"))
    print(table[table["stack"] == "encoder"].to_string(index=False, na_rep=""))
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
