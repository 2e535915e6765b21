"""The notebooks run from top to bottom on the smoke experiment's results, and are stored bare."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.smoke import SmokeRun

FOLDER = ROOT / "analysis" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
KERNEL = "this_interpreter"

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


class Executed:
    """A notebook after its execution."""

    def __init__(self, name: str) -> None:
        self.notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
        client = NotebookClient(
            self.notebook, timeout=60, kernel_name=KERNEL, resources={"metadata": {"path": str(FOLDER)}}
        )
        client.execute()

    def outputs(self, cell_id: str) -> list[Any]:
        (cell,) = (cell for cell in self.notebook.cells if cell.id == cell_id)
        outputs: list[Any] = cell.outputs
        return outputs

    def text(self, cell_id: str) -> str:
        """Return what a cell printed."""
        return "".join(output.text for output in self.outputs(cell_id) if output.output_type == "stream")

    def table(self, cell_id: str) -> str:
        """Return a table that a cell ends with, as text."""
        (output,) = (o for o in self.outputs(cell_id) if o.output_type == "execute_result")
        return str(output.data["text/plain"])

    def num_figures(self) -> int:
        cells = (cell for cell in self.notebook.cells if cell.cell_type == "code")
        return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)

    def complaints(self) -> list[str]:
        cells = (cell for cell in self.notebook.cells if cell.cell_type == "code")
        return [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


@pytest.fixture(autouse=True)
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the interpreter that runs the tests, whatever kernels the machine knows."""
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / KERNEL)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs_and_only_what_is_needed(name: str) -> None:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell["id"]), "a name that stays, not a random one"
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    nbformat.validate(content)


def test_skew_sweep_shows_what_the_report_says(smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMOENY_RESULTS", str(smoke.results / "smoke"))
    executed = Executed("skew_sweep")
    assert executed.complaints() == []
    assert executed.num_figures() == 3
    (table,) = smoke.results.glob("smoke/sweeps/*/table.csv")
    reported = pd.read_csv(table)
    shown = executed.table("table")
    for throughput in reported["throughput_tokens_per_s"]:
        assert f"{throughput:.3f}".rstrip("0").rstrip(".") in shown
    ratios = reported.loc[reported["router.skew"] == 0.9, "throughput_ratio_to_best_baseline"]
    for ratio in ratios:
        assert f"{ratio:.3f}" in executed.table("ratio")


def test_time_breakdown_takes_the_most_skewed_run_apart(smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMOENY_RESULTS", str(smoke.results / "smoke"))
    executed = Executed("time_breakdown")
    assert executed.complaints() == []
    assert executed.num_figures() == 2
    assert executed.text("load").startswith(str(smoke.folders[1]))
    layers = pd.read_parquet(smoke.folders[1] / "layers.parquet")
    for system, rows in layers.groupby("system"):
        lines = [line for line in executed.table("shares").splitlines() if line.startswith(f"{system} ")]
        *shares, layer_ms = (float(number) for line in lines for number in line.split()[1:])
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert rows["layer_s"].min() * 1e3 < layer_ms < rows["layer_s"].max() * 1e3
    rows = layers[(layers["system"] == "static_ep") & (layers["round"] == 0) & (layers["layer"] == 0)]
    relative = rows.set_index("rank")["executed_tokens"] / rows["executed_tokens"].mean()
    first = next(line for line in executed.table("load-of-ranks").splitlines() if line.startswith("static_ep"))
    assert [float(number) for number in first.split()[-2:]] == pytest.approx(relative.tolist(), abs=0.005)


def test_own_policy_plans_and_is_simulated() -> None:
    executed = Executed("own_policy")
    assert executed.complaints() == []
    assert executed.num_figures() == 2
    assert executed.text("conservation").startswith("53 batches, 4 settings")
    loads = [int(number) for number in re.findall(r"\d{3,}", executed.table("counts"))]
    assert sum(loads[:8]) == sum(loads[8:]) == 8 * 8192, "nothing is lost"
    assert max(loads[:8]) == loads[0] > max(loads[8:]), "rank 0 is relieved"


def test_paper_comparison_holds_all_three_kinds_of_numbers(smoke: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMOENY_RESULTS", str(smoke.results / "smoke"))
    executed = Executed("paper_comparison")
    assert executed.complaints() == []
    assert executed.num_figures() == 3
    (output,) = executed.outputs("claims")
    claims = output.data["text/markdown"]
    assert re.search(r"\| abstract \|.*\+37 % to \+70 %", claims)
    iterations = pd.read_parquet(smoke.folders[1] / "iterations.parquet")
    rounds = iterations.pivot(index="round", columns="system", values="throughput_tokens_per_s")
    best = rounds[["static_ep", "even_split"]].median().idxmax()
    change = (rounds["harmoeny"] / rounds[best]).median() - 1
    assert f"| measured | 0.9 | {change:+.0%} [" in claims
    unseen = pd.read_csv(ROOT / "results" / "validation" / "paper_throughputs.csv").query("not calibration")
    errors = ((unseen["predicted"] - unseen["published"]) / unseen["published"]).abs()
    assert f"median {errors.median():.1%}, worst {errors.max():.1%}" in executed.text("simulator-order")
