"""The GPU check without a GPU: what it measures is right, its goals are judged, and nothing outlives its time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import packaging
import psutil
import pytest
import torch
from rich.console import Console

from harmoeny.runtime.kernels.alone import NOTHING_ALONE
from harmoeny.runtime.kernels.grouped_mm import GroupedMM
from harmoeny.runtime.memory.experts import LayerExperts
from scripts.gpu_check import groups
from scripts.gpu_check.__main__ import main
from scripts.gpu_check.check import check
from scripts.gpu_check.interleave import interleave
from scripts.gpu_check.layer import grouped_products
from scripts.gpu_check.layer import measure as measure_layer
from scripts.gpu_check.model import measure as measure_model
from scripts.gpu_check.packages import ROOT, missing_packages
from scripts.gpu_check.parts import CUDA_TESTS, NUMBERS, Part, Row, all_parts
from scripts.gpu_check.shapes import SHAPES, Measurement
from tests.harmoeny.runtime.cases import apply_expert, random_experts
from tests.synthetic import write_run

TINY = Measurement(SHAPES["tiny"], torch.device("cpu"), 2, Path("unused"))
PARTS = {part.name: part for part in all_parts("cuda", rehearsal=False)}


def estimate(median: float) -> dict[str, Any]:
    return {"median": median, "low": median, "high": median, "n": 3}


def rows(part: str, numbers: Any, out: Path) -> list[Row]:
    (out / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")
    return PARTS[part].rows(out)


def met(found: list[Row]) -> list[bool | None]:
    return [row.met for row in found]


class TestMeasuring:
    def test_a_round_goes_forward_and_backward(self) -> None:
        called: list[str] = []
        times = interleave({name: partial(called.append, name) for name in "ABC"}, torch.device("cpu"), 2)
        assert "".join(called) == "ABCCBA" * 5, "three rounds of warm-up, two measured"
        interleave({"A": lambda: None}, torch.device("cpu"), 1, {"A": partial(called.append, "p")})
        assert "".join(called).endswith("p" * 8), "before every time"
        assert {name: len(taken) for name, taken in times.items()} == {"A": 2, "B": 2, "C": 2}

    def test_the_products_are_those_of_the_layer(self) -> None:
        experts: LayerExperts = random_experts(5, 0, gated=True)
        hidden = torch.randn(7, 8)
        ids = torch.tensor([[0, 4], [4, 2], [2, 0], [0, 2], [4, 0], [0, 4], [2, 4]])
        order = sorted(range(14), key=lambda a: int(ids.flatten()[a]))
        wanted = torch.stack([apply_expert(experts, int(ids.flatten()[a]), hidden[a // 2]) for a in order])
        torch.testing.assert_close(grouped_products(experts, hidden, ids)().double(), wanted, rtol=1e-4, atol=1e-5)

    def test_layer_and_model_run_on_a_cpu(self) -> None:
        with torch.inference_mode():
            layer, model = measure_layer(TINY), measure_model(TINY)
        assert set(layer) == {"prefill", "decode"}
        assert all(layer[size]["products"]["ratio_to_products"]["median"] == 1 for size in layer)
        assert set(model["decode"]) == {"error", "eager", "batched_mm", "grouped_mm", "harmoeny"}

    def test_a_model_that_computes_something_else_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scripts.gpu_check.model.difference", lambda ours, theirs: float("nan"))  # noqa: ARG005
        with torch.inference_mode(), pytest.raises(ValueError, match="prefill: logits differ by nan"):
            measure_model(TINY)


class TestGoals:
    @pytest.mark.parametrize(("prefill", "decode"), [(1.0, 0.9), (1.2, 0.9), (1.0, 1.1)])
    def test_model(self, prefill: float, decode: float, tmp_path: Path) -> None:
        numbers = {
            phase: {"harmoeny": {"ratio_to_grouped_mm": estimate(ratio)}}
            for phase, ratio in (("prefill", prefill), ("decode", decode))
        }
        assert met(rows("model", numbers, tmp_path)) == [prefill <= 1.05, decode <= 1.0]

    @pytest.mark.parametrize("ratio", [1.5, 1.7])
    def test_layer(self, ratio: float, tmp_path: Path) -> None:
        size = {"num_tokens": 4096, "harmoeny": {"ratio_to_products": estimate(ratio)}}
        assert met(rows("layer", {"prefill": size, "decode": size}, tmp_path)) == [ratio <= 1.6, None]

    def test_prefetch_counts_only_from_the_threshold_up(self, tmp_path: Path) -> None:
        def numbers(hidden: float, sync: float) -> dict[str, Any]:
            shares = {"async": [0.1, hidden], "sync": [0.9, sync]}
            return {
                "rows": [
                    {"strategy": strategy, "times_threshold": times, "hidden_share": share}
                    for strategy, both in shares.items()
                    for times, share in zip((0.5, 1.0), both, strict=True)
                ]
            }

        assert met(rows("prefetch", numbers(0.95, 0.0), tmp_path)) == [True, True]
        assert met(rows("prefetch", numbers(0.8, 0.5), tmp_path)) == [False, False]

    @pytest.mark.parametrize(("latency_s", "reached"), [(1.0, True), (1.2, False)])
    def test_sweep_at_four_ranks(self, latency_s: float, reached: bool, tmp_path: Path) -> None:
        even = {"harmoeny": [1.0] * 3, "static_ep": [1.1] * 3, "ideal": [0.1] * 3, "drop": [0.1] * 3}
        write_run(tmp_path / "even", latency_s=even, skew=0.0)
        write_run(tmp_path / "skewed", latency_s=even | {"harmoeny": [latency_s] * 3, "static_ep": [2.0] * 3}, skew=0.9)
        assert met(PARTS["skew_sweep_4"].rows(tmp_path)) == [reached, True]
        assert met(PARTS["skew_sweep_2"].rows(tmp_path)) == [None, None]

    def test_a_sweep_without_its_ends_gives_no_number(self, tmp_path: Path) -> None:
        write_run(tmp_path / "skewed", skew=0.9)
        with pytest.raises(ValueError, match="must be finished at 0 and"):
            PARTS["skew_sweep_4"].rows(tmp_path)

    @pytest.mark.parametrize(("inside", "passed"), [("", True), ("<failure/>", False), ("<skipped/>", False)])
    def test_tests(self, inside: str, passed: bool, tmp_path: Path) -> None:
        cases = f"<testsuites><testsuite><testcase/><testcase>{inside}</testcase></testsuite></testsuites>"
        (tmp_path / "tests.xml").write_text(cases, encoding="utf-8")
        assert met(PARTS["cuda_tests"].rows(tmp_path)) == [passed]

    def test_a_rehearsal_reaches_nothing(self, tmp_path: Path) -> None:
        part = next(part for part in all_parts("cpu", rehearsal=True) if part.name == "model")
        numbers = {phase: {"harmoeny": {"ratio_to_grouped_mm": estimate(9.0)}} for phase in ("prefill", "decode")}
        (tmp_path / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")
        assert {(row.goal, row.met) for row in part.rows(tmp_path)} == {("", None)}


MACHINE = {"title": "GPU check", "device": "none", "torch": "0"}


class TestCommand:
    def run(self, parts: list[Part], out: Path, minutes: float = 1) -> tuple[list[str], str]:
        printed = StringIO()
        outcomes = check(parts, out, minutes, MACHINE, Console(file=printed, width=120))
        return [outcome.status for outcome in outcomes], printed.getvalue()

    @staticmethod
    def part(name: str, code: str, limit_s: float = 30) -> Part:
        return Part(
            name, "a part", lambda out: [sys.executable, "-c", code, str(out)], limit_s, lambda _: [Row("x", "1")]
        )

    @pytest.mark.programs
    def test_results_of_what_came_first_survive_what_fails(self, tmp_path: Path) -> None:
        parts = [self.part("good", "print('fine')"), self.part("bad", "raise SystemExit('the reason')")]
        statuses, printed = self.run(parts, tmp_path)
        assert statuses == ["done", "failed"]
        assert "the reason" in printed
        assert (tmp_path / "good.log").read_text(encoding="utf-8") == "fine\n"
        assert re.search(r"\| good, \d+ s \| x \| 1 \|  \|  \|", (tmp_path / "table.md").read_text(encoding="utf-8"))

    @pytest.mark.programs
    def test_a_part_and_its_children_end_at_the_limit(self, tmp_path: Path) -> None:
        child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        code = (
            "import subprocess, sys, pathlib\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid))\n"
            "child.wait()"
        )
        start = time.monotonic()
        statuses, _ = self.run([self.part("slow", code, limit_s=2), self.part("next", "")], tmp_path)
        assert statuses == ["stopped", "done"]
        assert time.monotonic() - start < 25
        pid = int((tmp_path / "slow" / "pid").read_text(encoding="utf-8"))
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    @pytest.mark.programs
    def test_what_finds_no_time_is_said(self, tmp_path: Path) -> None:
        parts = [self.part("first", "import time; time.sleep(2)"), self.part("second", "")]
        assert self.run(parts, tmp_path, minutes=2 / 60)[0][1] == "no time left"

    @pytest.mark.programs
    def test_no_results_are_a_failure(self, tmp_path: Path) -> None:
        part = Part("model", "the model", lambda _: [sys.executable, "-c", ""], 30, PARTS["model"].rows)
        assert self.run([part], tmp_path)[0] == ["failed"]

    def test_a_machine_without_a_gpu_is_refused(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "out")])
        assert "sees no CUDA device here; --rehearse" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_an_unknown_part_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--only", "everything"])
        assert "--only: 'everything', must be among skew_sweep_8" in capsys.readouterr().err

    def test_this_environment_has_what_it_needs(self) -> None:
        assert missing_packages() == []

    @pytest.mark.programs
    @pytest.mark.parametrize(
        ("option", "status", "said"),
        [
            ("--help", 0, "hydra-core<1.4,>=1.3.2"),
            ("--list", 0, "missing here, and needed to list the parts: datasets>=4, hydra-core"),
            ("--rehearse", 2, "error: packages: pip install 'datasets>=4' 'hydra-core"),
        ],
    )
    def test_where_packages_are_missing_it_says_which(
        self, option: str, status: int, said: str, tmp_path: Path
    ) -> None:
        (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
        done = subprocess.run(
            [sys.executable, "-S", "-m", "scripts.gpu_check", option],  # -S: the environment's packages are not there
            cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        printed = " ".join((done.stdout + done.stderr).split())
        assert said in printed
        assert "pytest>=8.3" in printed

    def test_all_cuda_tests_are_run(self) -> None:
        assert CUDA_TESTS in PARTS["cuda_tests"].command(Path("out"))
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "cuda" in path.read_text()]
        assert len(marked) >= 2
        assert all(path.is_relative_to(ROOT / CUDA_TESTS) for path in marked)


@pytest.mark.parametrize(("num_rows", "num_slots"), [(512, 3), (4097, 9)])
@pytest.mark.parametrize("num_hot", [0, 2])
def test_rows_of_few_large_slices_are_those_of_many_alike(num_rows: int, num_slots: int, num_hot: int) -> None:
    tokens = groups.slices(num_rows, num_slots, num_hot)
    assert tokens.sum() == num_rows
    assert np.ptp(tokens[num_hot:]) <= 1
    if num_hot:
        assert np.ptp(tokens[:num_hot]) == 0
        assert tokens[:num_hot].sum() == pytest.approx(0.9 * num_rows, abs=num_hot)
    rows, matrices = torch.randn(num_rows, 16), torch.randn(num_slots, 16, 8)
    parts = torch.split(rows, tokens.tolist())
    truth = torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
    found = groups.multiply(GroupedMM(), rows, matrices, tokens, NOTHING_ALONE)()
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
