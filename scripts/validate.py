"""Validate the simulator against what was measured: a DGX-1 (`paper`), this machine (`ranks`), today's GPUs (`gpus`).

`paper` reads the authors' data from --reference. `ranks FOLDER` reads finished runs on real ranks of this machine,
simulates them on its profile (python -m scripts.calibrate writes one), and keeps what `all` needs to simulate them
again. `gpus` needs nothing: H200s, skew sweeps on 4 ranks of one H100 and of one H200, and, without being counted, what
was published with sizes that have to be assumed. `all` does the three, without new runs, in one table and one
figure, and fails where a machine's median error is above 10 %, or a point's above 40 % and docs/simulator.md does not
explain it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from analysis.present.prediction_figure import draw_machines, draw_validation
from experiments.compose.compose import compose_point
from experiments.compose.load import load_point
from experiments.launch.ranks import Ranks
from experiments.point.point import Point
from experiments.simulator.backend import Simulator
from experiments.simulator.gpus.assumed import PROFILES as ASSUMED_PROFILES
from experiments.simulator.gpus.assumed import compare_assumed
from experiments.simulator.gpus.validation import PROFILES, compare_gpus
from experiments.simulator.paper.figures import throughputs
from experiments.simulator.paper.validation import (
    PaperMachine,
    compare_breakdowns,
    compare_throughputs,
    summarise_errors,
    wrong_rankings,
)
from experiments.simulator.ranks_validation import measure_runs, predict_runs, simulated_config
from results_schema.atomic import write_text
from results_schema.files import CONFIG
from results_schema.printing import print_anything
from results_schema.tables import LAYERS
from results_schema.walk import walk_files
from scripts.gpu_check.parts import sweep_options

REFERENCE = Path("../shared/reference/harmoeny-paper")
OUT = Path("results/validation")
EPS_LAYERS = Path("results/published/eps_moe_layers.csv")
#: Beside the measured layers: the configurations of the runs, and the profile of the machine that measured.
RANKS, RANKS_POINTS, RANKS_PROFILE = "ranks.csv", "ranks_points.yaml", "this_machine.yaml"
#: What was fitted, in what was measured on 4 ranks of one H100; on an H200 nothing was.
GPU_SWEEP_FITTED = ("static_ep", "skew 0")
SHARED_GPU = "4 ranks of one GPU"
LIMIT_MEDIAN, LIMIT_POINT = 0.10, 0.40
#: System and case of points that are worse, which docs/simulator.md explains, and how many they are.
EXPLAINED = {
    ("llep", "Kimi-K2"): 1, ("libra", "skew 0, H200"): 1, ("libra", "skew 0.9, H200"): 1,
    ("fastermoe", "skew 0.9, H200"): 1, ("trtllm_eplb", "skew 0.9, H200"): 1,
}  # fmt: skip
_FORMATS = {"error": "{:+.1%}".format} | dict.fromkeys(("published", "simulated", "predicted"), "{:.2f}".format)


def validate_paper(reference: Path, out: Path, num_batches: int) -> pd.DataFrame:
    """Compare with the published figures; print and write tables, draw, and return the throughputs."""
    machine = PaperMachine(compose_point("experiment=paper_gpus"))
    breakdowns = compare_breakdowns(machine, reference)
    compared = compare_throughputs(machine, reference, throughputs(reference), num_batches)
    write_text(out / "paper_breakdowns.csv", breakdowns.to_csv(index=False, float_format="%.4g"))
    write_text(out / "paper_throughputs.csv", compared.to_csv(index=False, float_format="%.5g"))
    _show("Time breakdowns, ms (calibration)", breakdowns)
    _show("Throughput of Switch-128, sequences/s", compared)
    _show_errors(compared)
    wrong = wrong_rankings(compared)
    print(f"wrong order, where the published figures differ by more than 5 %: {'; '.join(wrong) or 'none'}")
    caption = "Measured: arXiv 2506.12417, 8 x V100. Predicted: simulator, hardware dgx1_v100."
    print(draw_validation(compared, out, "paper", "Throughput (sequences/s)", caption))
    return compared


def validate_gpus(out: Path) -> pd.DataFrame:
    """Compare with what H200s were seen to take; print, write and return the table."""
    names = {*PROFILES.values(), *ASSUMED_PROFILES}
    described = {name: compose_point("experiment=smoke", f"hardware={name}").hardware for name in names}
    compared = compare_gpus(described)
    assumed = compare_assumed(described, pd.read_csv(EPS_LAYERS))
    write_text(out / "assumed.csv", assumed.to_csv(index=False, float_format="%.4g"))
    _show("Published with sizes that are assumed here; not counted", assumed.drop(columns="assumed"))
    write_text(out / "gpus.csv", compared.to_csv(index=False, float_format="%.4g"))
    _show("H200: ms and speed-ups", compared.drop(columns="source"))
    _show_errors(compared)
    return compared


class GpuSweep(NamedTuple):
    """A skew sweep on 4 ranks of one GPU.

    Attributes:
        phases: what was measured.
        options: as what, beside the options of the check's sweep.
        told: what tells it from the others, in cases.
        profile: of one of the ranks; None: the ``h100_quarter`` of ``conf/hardware``.
        fitted: whether the profile is fitted to :data:`GPU_SWEEP_FITTED` of it.
    """

    phases: Path
    options: dict[str, int]
    told: str
    profile: Path | None = None
    fitted: bool = True


GPU_SWEEPS = (
    GpuSweep(
        Path("results/gpu/h100_4_ranks/phases.csv"), {"model.num_layers": 1, "rounds": 7}, "",
        OUT / "h100_quarter_fc2a3d9a.yaml",
    ),
    GpuSweep(
        Path("results/gpu/h100_4_ranks_4_layers/phases.csv"), {"model.num_layers": 4, "rounds": 9}, ", later runtime"
    ),
    GpuSweep(
        Path("results/gpu/h200_4_ranks/phases.csv"), {}, ", H200", OUT / "h200_quarter_87998389.yaml", fitted=False
    ),
)  # fmt: skip


def validate_shared_gpu(out: Path) -> pd.DataFrame:
    """Compare with the layers of the skew sweeps on 4 ranks of one GPU; print, write and return the table."""
    compared = pd.concat([_compare_sweep(sweep) for sweep in GPU_SWEEPS], ignore_index=True)
    write_text(out / "gpu_sweep.csv", compared.to_csv(index=False, float_format="%.4g"))
    _show(f"Latency of a MoE layer on {SHARED_GPU}, ms (published: measured there)", compared.drop(columns="device"))
    _show_errors(compared)
    return compared


def _compare_sweep(sweep: GpuSweep) -> pd.DataFrame:
    """Return the layers of one, measured and simulated.

    Raises:
        ValueError: not all of them were simulated.
    """
    phases = pd.read_csv(sweep.phases)
    measured = pd.DataFrame(
        {
            "system": phases["system"],
            "case": "skew " + phases["router.skew"].map("{:g}".format),
            "published": phases["layer_s"] * 1e3,
            "device": phases["device"],
        }
    )
    hardware = ["hardware=h100_quarter"] if sweep.profile is None else _as_options(sweep.profile)
    options = sweep_options(4) | sweep.options | {"backend": Simulator.name}
    skews = phases["router.skew"].unique()
    points = [
        compose_point(*hardware, *(f"{k}={v}" for k, v in (options | {"router.skew": skew}).items())) for skew in skews
    ]
    compared = predict_runs(measured, points)
    if len(compared) != len(measured):
        raise ValueError(f"{sweep.phases}: {len(measured)} layers, simulated are {len(compared)}")
    system, case = GPU_SWEEP_FITTED
    compared["calibration"] = sweep.fitted & (compared["system"] == system) & (compared["case"] == case)
    return compared.assign(case=compared["case"] + sweep.told)


def record_ranks(folder: Path, hardware: str, out: Path) -> None:
    """Keep what finished runs of this machine measured, with their configurations and its profile.

    Raises:
        ValueError: there is no such run.
    """
    composed = compose_point(f"hardware={hardware}").config
    found = []
    for path in sorted(file for file in walk_files(folder, skip_unreadable=True) if file.name == LAYERS.file):
        config = yaml.safe_load((path.parent / CONFIG).read_text(encoding="utf-8"))
        if config["backend"] == Ranks.name:
            found.append((path.parent, config))
    if not found:
        raise ValueError(f"{folder}: no run on real ranks; python run.py experiment=skew_sweep hardware={hardware}")
    measured = measure_runs(
        (path, load_point(simulated_config(config, composed), here=False)) for path, config in found
    )
    write_text(out / RANKS, measured.to_csv(index=False, float_format="%.4g"))
    write_text(out / RANKS_POINTS, yaml.safe_dump([config for _, config in found], sort_keys=False))
    write_text(out / RANKS_PROFILE, Path("conf", "hardware", f"{hardware}.yaml").read_text(encoding="utf-8"))


def validate_ranks(out: Path) -> pd.DataFrame:
    """Compare with the layers that :func:`record_ranks` kept; print and write the table, draw and return it."""
    measured = pd.read_csv(out / RANKS, usecols=["system", "case", "published", "device"])
    compared = predict_runs(measured, _recorded_points(out))
    write_text(out / RANKS, compared.to_csv(index=False, float_format="%.4g"))
    _show("Latency of a MoE layer, ms (published: measured here)", compared)
    _show_errors(compared)
    devices = ", ".join(compared["device"].unique())
    caption = f"Measured: real ranks, {devices}. Predicted: simulator, on the machine's own profile."
    print(draw_validation(compared, out, "ranks", "Latency of a MoE layer (ms)", caption))
    return compared


def _recorded_points(out: Path) -> list[Point]:
    composed = compose_point(*_as_options(out / RANKS_PROFILE)).config
    configs = yaml.safe_load((out / RANKS_POINTS).read_text(encoding="utf-8"))
    return [load_point(simulated_config(config, composed), here=False) for config in configs]


def _as_options(profile: Path) -> list[str]:
    """Return a profile that is not in ``conf/hardware`` as options."""
    values: dict[str, Any] = yaml.safe_load(profile.read_text(encoding="utf-8"))
    base = [f"hardware={name}" for name in values.pop("defaults")]
    return base + [f"hardware.{name}={json.dumps(value)}" for name, value in values.items()]


def validate_all(reference: Path, out: Path, num_batches: int) -> list[str]:
    """Compare with all there is; print and write one table, draw one figure, and return what is wrong."""
    machines = {
        "DGX-1, 8 x V100": validate_paper(reference, out, num_batches),
        "two CPU cores": validate_ranks(out),
        "H200": validate_gpus(out),
        SHARED_GPU: validate_shared_gpu(out),
    }
    rows, wrong = [], []
    for machine, compared in machines.items():
        errors = summarise_errors(compared)
        held_out = compared[~compared["calibration"]]
        far = held_out[held_out["error"].abs() > LIMIT_POINT]
        rows.append({"machine": machine, **errors, "fitted": int(compared["calibration"].sum()), "far_off": len(far)})
        if errors["median"] > LIMIT_MEDIAN:
            wrong.append(f"{machine}: median error {errors['median']:.1%}, must be at most {LIMIT_MEDIAN:.0%}")
        for (system, case), points in far.groupby(["system", "case"]):
            if len(points) > EXPLAINED.get((str(system), str(case)), 0):
                wrong.append(f"{machine}: {system}, {case}: {points['error'].abs().max():.0%} off, must be explained")
    table = pd.DataFrame(rows)
    write_text(out / "validation.csv", table.to_csv(index=False, float_format="%.4g"))
    print(f"\n{table.to_string(index=False, formatters=dict.fromkeys(('median', 'worst'), '{:.1%}'.format))}\n")
    print(draw_machines(machines, out, "validation"))
    return wrong


def _show(title: str, frame: pd.DataFrame) -> None:
    formats = {name: form for name, form in _FORMATS.items() if name in frame}
    print(f"\n{title}\n{frame.to_string(index=False, formatters=formats)}\n")


def _show_errors(compared: pd.DataFrame) -> None:
    errors = summarise_errors(compared)
    print(
        f"{errors['points']:.0f} points that nothing was fitted on: median error {errors['median']:.1%}, "
        f"worst {errors['worst']:.1%}"
    )


def main() -> None:
    """Read the command line."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m scripts.validate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "all": "all three, without new runs",
        "paper": "a DGX-1, as published",
        "gpus": "H200s, and 4 ranks of one GPU",
    }
    for name, what in helps.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("--out", type=Path, default=OUT, help=f"where results go (default: {OUT})")
        if name != "gpus":
            text = f"the authors' data (default: {REFERENCE})"
            command.add_argument("--reference", type=Path, default=REFERENCE, help=text)
            command.add_argument("--batches", type=int, default=3, help="batches per point (default: 3)")
    ranks = commands.add_parser("ranks", help="runs on real ranks of this machine")
    ranks.add_argument("folder", type=Path, help="finished runs: python run.py experiment=skew_sweep hardware=NAME")
    ranks.add_argument("--hardware", required=True, help="this machine's profile in conf/hardware")
    ranks.add_argument("--out", type=Path, default=OUT, help=f"where results go (default: {OUT})")
    arguments = parser.parse_args()
    if arguments.command in ("all", "paper") and not arguments.reference.is_dir():
        parser.error(f"--reference: {str(arguments.reference)!r}, must be the folder with the authors' CSV files")
    if arguments.command == "all":
        if wrong := validate_all(arguments.reference, arguments.out, arguments.batches):
            sys.exit("error: " + "; ".join(wrong))
    elif arguments.command == "paper":
        validate_paper(arguments.reference, arguments.out, arguments.batches)
    elif arguments.command == "gpus":
        validate_gpus(arguments.out)
        validate_shared_gpu(arguments.out)
    else:
        try:
            record_ranks(arguments.folder, arguments.hardware, arguments.out)
        except ValueError as error:
            parser.error(str(error))
        validate_ranks(arguments.out)


if __name__ == "__main__":
    main()
