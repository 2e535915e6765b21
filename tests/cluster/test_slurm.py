"""Sweeps and ranks that a real SLURM runs. One sweep of three points goes through it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from experiments.results.run_folder import RunFolder
from tests.cluster.slurm_node import need_slurm, slurm_node
from tests.experiments.command import ROOT, Command
from tests.experiments.faulty import reached

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400), pytest.mark.usefixtures("text_prepared")]

RUN_S = 180


class ArraySweep:
    """The same command every time: three points, the second of which stalls where its file exists."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self.variables = folder, variables
        self.results = folder / "results"
        self.switches = [folder / name for name in ("first", "second", "third")]

    def start(self) -> Command:
        return Command(
            self.folder,
            *("run.py", "experiment=smoke", "hydra/launcher=slurm", f"results_dir={self.results}"),
            *("system=[static_ep]", "+systems.faulty={_target_:tests.experiments.faulty.Faulty}"),
            "+systems.faulty.switch=" + ",".join(str(switch) for switch in self.switches),
            *("router.skew=0.9", "rounds=2", "wandb.mode=disabled"),
            variables=self.variables,
        )

    def folders(self, *, finished: bool) -> list[Path]:
        found = (path.parent for path in self.results.glob("smoke/*/slurm.json"))
        return sorted(folder for folder in found if RunFolder(folder).is_finished == finished)

    def num_submitted(self) -> int:
        return len(list(self.results.glob("smoke/slurm/*/*_submitted.pkl")))


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    need_slurm()
    with slurm_node() as variables:
        yield variables


@pytest.fixture(scope="module")
def sweep(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ArraySweep:
    return ArraySweep(tmp_path_factory.mktemp("array"), slurm)


def _batch(slurm: dict[str, str], folder: Path, *arguments: str) -> str:
    """Run a batch script to its end and return what it printed."""
    log = folder / "batch.out"
    variables = os.environ | slurm | {"PYTHON": sys.executable}
    command = ["sbatch", "--parsable", f"--output={log}", *arguments]
    job = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=30, check=True)
    end = time.monotonic() + RUN_S
    # sbatch has a --wait, which looks at the job every ten seconds only.
    while job.stdout.strip() in subprocess.check_output(["squeue", "--me", "-h", "-o", "%i"], env=variables, text=True):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    return log.read_text()


def test_a_task_goes_on_without_us_and_is_named_when_it_is_cancelled(sweep: ArraySweep) -> None:
    sweep.switches[1].write_text("stall")
    # Leaving the block ends all that comes from the command, SLURM's task too.
    with sweep.start() as left:
        left.wait_until(lambda: len(sweep.folders(finished=True)) == 2 and reached(sweep.switches[1]).exists(), RUN_S)
        (stalled,) = sweep.folders(finished=False)
        job = json.loads((stalled / "slurm.json").read_text())["job"]
        array = job.removesuffix("_1")
        assert job == f"{array}_1", "the second of an array"
        left.signal(signal.SIGINT)
        assert left.wait(60) == 130, left.output()
        _, submitted, *ended, last = left.output().splitlines()
        assert submitted == f"SLURM job {array}: 3 points submitted; output in {sweep.results / 'smoke' / 'slurm'}"
        assert all(line.endswith(("/first (1 of 3): finished", "/third (3 of 3): finished")) for line in ended)
        assert last.startswith(f"interrupted: SLURM goes on with job {array};")

        with sweep.start() as command:
            command.wait_until(lambda: "1 point is in SLURM's queue already" in command.output(), RUN_S)
            subprocess.run(["scancel", job], env=os.environ | sweep.variables, timeout=30, check=True)
            assert command.wait(60) == 1, command.output()
            (error,) = command.errors()
            assert "/second (2 of 3): " in error
            assert f"{job}_0_log.out" in error
            output = command.output()
    assert "sacct" not in output, "there is no data base of past jobs, and nobody has to know"
    assert "warn" not in output.lower()
    assert sweep.num_submitted() == 3, "what was queued was not submitted once more"


def test_the_same_command_submits_only_what_is_missing(sweep: ArraySweep) -> None:
    before = {path: path.stat().st_mtime_ns for folder in sweep.folders(finished=True) for path in folder.iterdir()}
    assert {path.name for path in before} >= {"layers.parquet", "summary.json", "manifest.json", "slurm.json"}
    sweep.switches[1].unlink()
    with sweep.start() as command:
        assert command.wait(RUN_S) == 0, command.output()
        output = command.output()
    assert "3 points, 1 to run" in output
    assert ": 1 point submitted" in output
    assert sweep.num_submitted() == 4
    assert len(sweep.folders(finished=True)) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for folder in sweep.folders(finished=True):
        layers = pd.read_parquet(folder / "layers.parquet")
        assert set(layers["rank"]) == {0, 1}, "a task starts both ranks of its point"
    (table,) = sweep.results.glob("smoke/sweeps/*/table.csv")
    assert len(pd.read_csv(table)) == 3 * 2, "three points, two systems"


def test_collecting_reports_the_sweep_again(slurm: dict[str, str], sweep: ArraySweep) -> None:
    (table,) = sweep.results.glob("smoke/sweeps/*/table.csv")
    before = table.read_text()
    table.unlink()
    output = _batch(slurm, sweep.folder, "scripts/slurm/collect.sbatch", str(sweep.results / "smoke"))
    assert table.read_text() == before, output
    assert f"table:  {table}" in output


def test_tasks_of_srun_are_ranks(slurm: dict[str, str], tmp_path: Path) -> None:
    arguments = ("experiment=smoke", "system=[static_ep]", "router.skew=0.9", "rounds=1", "wandb.mode=disabled")
    output = _batch(
        slurm, tmp_path, "--ntasks=2", "scripts/slurm/ranks.sbatch", *arguments, f"results_dir={tmp_path / 'results'}"
    )
    (path,) = tmp_path.glob("results/smoke/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", 2), output
    layers = pd.read_parquet(path.parent / "layers.parquet")
    assert sorted(layers["rank"].unique()) == [0, 1]
    assert layers.groupby("layer")["executed_tokens"].sum().tolist() == [2 * 64, 2 * 64, 2 * 2], "nothing is lost"
    assert output.count("round 1 of 1") == 1, "rank 0 alone speaks"
