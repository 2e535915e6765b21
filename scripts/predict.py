"""Write the simulator's predictions of the paper's runs to results/predictions: experiments paper_qwen and paper_gpus.

Units are the paper's: its throughput is in sequences/s over all GPUs, and its "MTTFT" is the latency of a batch divided
by the sequences of all GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.compose.compose import compose_point
from experiments.point.point import Point
from experiments.simulator.backend import simulate
from results_schema.atomic import write_text
from results_schema.printing import print_anything
from results_schema.tables import ITERATIONS, LAYERS

OUT = Path("results/predictions")
SKEWS = (0.0, 0.5, 0.9)
#: Per file: the options that all points share, and per point its own with the columns that name it.
_SWEEPS: dict[str, tuple[list[str], list[tuple[list[str], dict[str, Any]]]]] = {
    name: (
        ["experiment=paper_qwen", *model],
        [([f"router.skew={skew}"], {"skew": skew}) for skew in SKEWS],
    )
    for name, model in (("paper_qwen", []), ("paper_qwen_whole", ["model=qwen15_moe"]))
} | {
    "paper_gpus": (
        ["experiment=paper_gpus"],
        [
            ([f"router.skew={skew}", f"world_size={gpus}"], {"world_size": gpus, "skew": skew})
            for skew in SKEWS
            for gpus in (2, 4, 8)
        ],
    )
}


def predict(point: Point) -> pd.DataFrame:
    """Return one row per system, with the paper's units; a system that does not fit has a reason and no numbers."""
    simulation = simulate(point)
    rows: list[dict[str, Any]] = [
        {"system": name, "out_of_memory": reason} for name, reason in simulation.out_of_memory.items()
    ]
    if simulation.iterations:
        tables = simulation.tables(point)
        idle_s = tables[LAYERS].groupby("system")["idle_s"].mean()
        for system, runs in tables[ITERATIONS].groupby("system", sort=False):
            latency_s, num_sequences = runs["latency_s"].mean(), runs["num_sequences"].iloc[0]
            rows.append(
                {
                    "system": system,
                    "batch_size": num_sequences // point.options.world_size,
                    "throughput_sequences_per_s": num_sequences / latency_s,
                    "ttft_ms_per_sequence": latency_s / num_sequences * 1e3,
                    "mean_idle_ms": idle_s[str(system)] * 1e3,
                }
            )
    order = {name: i for i, name in enumerate(point.systems)}
    return pd.DataFrame(rows).sort_values("system", key=lambda names: names.map(order), ignore_index=True)


def write_predictions(name: str, out: Path) -> Path:
    """Predict all points of one file and write it."""
    shared, points = _SWEEPS[name]
    frames = []
    for overrides, columns in points:
        frame = predict(compose_point(*shared, *overrides))
        for position, (column, value) in enumerate(columns.items()):
            frame.insert(1 + position, column, value)
        frames.append(frame)
    path = out / f"{name}.csv"
    write_text(path, pd.concat(frames).to_csv(index=False, float_format="%.5g"))
    return path


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.predict", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"files to write: {', '.join(_SWEEPS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where they go (default: {OUT})")
    arguments = parser.parse_args()
    for name in arguments.name or list(_SWEEPS):
        if name not in _SWEEPS:
            parser.error(f"{name!r}, must be one of {', '.join(_SWEEPS)}")
        print(write_predictions(name, arguments.out))


if __name__ == "__main__":
    main()
