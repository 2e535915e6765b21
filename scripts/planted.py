"""Plants one defect at a time in what a number passes through, in a copy of the project, and sees a test fail.

A defect that no test notices is an error, and so is one whose place in the code is no longer there. docs/trust.md has
the list with its result; `python -m scripts.planted --markdown` prints it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from results_schema.printing import print_anything

ROOT = Path(__file__).resolve().parent.parent
_COPIED = (
    "analysis",
    "baselines",
    "conf",
    "experiments",
    "harmoeny",
    "hydra_plugins",
    "results_schema",
    "scripts",
    "tests",
)
_TIMEOUT_S = 240


@dataclass(frozen=True)
class Defect:
    """One wrong edit.

    Attributes:
        name: what is wrong then.
        file: where.
        right: text that stands there once.
        wrong: what stands there instead.
        tests: what has to notice, as pytest names it.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str


_ROUNDS = "tests/experiments/measure/test_rounds.py"
_CHECK = "tests/experiments/measure/test_check.py::test_every_planted_defect_is_refused_by_name_on_one_rank"
_COLD = "tests/experiments/measure/test_cold_start.py"
_ADVICE = "tests/analysis/advice"
_ROWS = "tests/experiments/results/test_rows.py"
_METRICS = "tests/analysis/data/test_metrics.py"
_SUMMARY = "tests/analysis/data/test_summary.py"
_STATS = "tests/analysis/data/test_stats.py"
_PAIRING = "tests/analysis/data/test_pairing.py"
_PAIRED = "tests/results_schema/test_paired.py"
_ADVANCE = "tests/experiments/simulator/test_advance.py"
_VIRTUAL = "tests/experiments/simulator/test_virtual.py"
_ENGINE = "tests/harmoeny/runtime/layer/test_engine.py"
_FETCH = "tests/harmoeny/runtime/memory/test_fetch.py"
_STAGED = "tests/harmoeny/runtime/layer/test_staged.py"
_KEPT = "tests/experiments/results/test_kept.py"

DEFECTS = (
    Defect("no barrier before the timer", "experiments/measure/rounds.py",
        "    bench.comm.barrier()\n", "", _ROUNDS),
    Defect("the barrier is timed", "experiments/measure/rounds.py",
        "    bench.comm.barrier()\n    bench.engine.recorder.begin_iteration()\n    start_s = time.perf_counter()\n",
        "    start_s = time.perf_counter()\n    bench.comm.barrier()\n    bench.engine.recorder.begin_iteration()\n",
        _ROUNDS),
    Defect("the device is not waited for", "experiments/measure/rounds.py",
        "    Device.of(bench.comm.device).synchronize_compute()\n", "", _ROUNDS),
    Defect("copies that a pass leaves behind are not waited for", "experiments/measure/rounds.py",
        "        bench.engine.finish()\n", "", _ROUNDS),
    Defect("copies that a pass leaves behind count as latency", "experiments/measure/rounds.py",
        "        bench.engine.finish()\n        return Timed(start_s, end_s, time.perf_counter())",
        "        bench.engine.finish()\n        end_s = time.perf_counter()\n"
        "        return Timed(start_s, end_s, end_s)", _ROUNDS),
    Defect("the clock's offset is left out", "experiments/measure/rounds.py",
        "timed.start_s + offset_s", "timed.start_s", _ROUNDS),
    Defect("the clock's offset has the wrong sign", "experiments/measure/clock.py",
        "stamp.item() - (sent + received) / 2", "(sent + received) / 2 - stamp.item()", _ROUNDS),
    Defect("clocks are compared once only", "experiments/measure/rounds.py",
        "    rig.begin_round()\n", "", _ROUNDS),
    Defect("the same system always begins", "experiments/measure/turns.py",
        "random.Random(pair)", "random.Random(0)", _ROUNDS),
    Defect("no round goes the other way", "experiments/measure/turns.py",
        "order[::-1] if backward else order", "order", _ROUNDS),
    Defect("the garbage collector runs inside a pass", "experiments/measure/turns.py",
        "    gc.disable()\n", "", _ROUNDS),
    Defect("systems keep what they learned in checks and warm-up", "experiments/measure/rounds.py",
        "        bench.begin_loop()\n", "        pass\n", _COLD),
    Defect("a reset forgets the history and keeps the placement", "harmoeny/runtime/layer/residency.py",
        "        self.placements[:] = self._first_placements\n", "", _COLD),
    Defect("placements see the batch that they are scored on", "harmoeny/runtime/layer/residency.py",
        "            changed = self._policy.update_placement(",
        "            self._history[layer].append(routed_counts(counts, placement))\n"
        "            changed = self._policy.update_placement(", f"{_ADVICE}/test_planted.py"),
    Defect("gains inside the error are advised", "analysis/advice/choose.py",
        "if gain.low > 1 + self.error]", "if gain.low > 1]", f"{_ADVICE}/test_gains.py"),
    Defect("rebalances cost advice nothing", "analysis/advice/gains.py",
        "seen_s - wait_s * (1 - 1 / passes)", "seen_s - wait_s", f"{_ADVICE}/test_gains.py"),
    Defect("the warm-up reads the first measured batch", "experiments/measure/batch.py",
        "    return point.most_rounds + point.calibration_batches\n", "    return 0\n", _COLD),
    Defect("every check passes", "experiments/measure/check.py", "passed=reason is None,", "passed=True,", _CHECK),
    Defect("layers are not compared", "experiments/measure/check.py",
        "if not rank.layer_error <= tolerance:", "if False:", _CHECK),
    Defect("lost assignments are not counted", "experiments/measure/check.py",
        "if exact and rank.num_kept != rank.num_wanted:", "if False:", _CHECK),
    Defect("outputs may be NaN", "experiments/measure/check.py",
        "if not torch.isfinite(tensor).all():", "if False:", _CHECK),
    Defect("plans are not looked at", "experiments/measure/plan_guard.py",
        "    system.planner.guard = _Guard(system, comm)\n", "", _CHECK),
    Defect("a failed system is measured all the same", "experiments/launch/rank.py",
        "if system.name not in failed]", "]", "tests/experiments/launch/test_failed_system.py"),
    Defect("latency ends with the first rank", "experiments/results/layer_rows.py",
        "max(r.end_s for r in ranks) - begin", "min(r.end_s for r in ranks) - begin", _ROWS),
    Defect("latency begins with the first rank", "experiments/results/layer_rows.py",
        "begin = max(r.start_s", "begin = min(r.start_s", _ROWS),
    Defect("throughput counts one rank's tokens", "experiments/results/layer_rows.py",
        "input_tokens = sum(r.input_tokens for r in ranks)", "input_tokens = ranks[0].input_tokens", _ROWS),
    Defect("idle is until the first rank ends", "experiments/results/layer_rows.py",
        '["compute_end_s"].transform("max")\n    frame["idle_s"] = last_end - frame["compute_end_s"]',
        '["compute_end_s"].transform("min")\n    frame["idle_s"] = frame["compute_end_s"] - last_end', _ROWS),
    Defect("idle is over all layers", "experiments/results/layer_rows.py",
        'frame.groupby(["iteration", "layer"])["comp', 'frame.groupby(["iteration"])["comp', _ROWS),
    Defect("drain is the first rank's", "experiments/results/layer_rows.py",
        "max(r.drain_s for r in ranks)", "ranks[0].drain_s", _ROWS),
    Defect("what a batch leaves behind costs no throughput", "results_schema/rates.py",
        "max(latency_s, restoring_s)", "latency_s", _ROWS),
    Defect("a request's time begins with its batch", "experiments/results/request_rows.py",
        'return self.first_token_s - self.arrival_s', 'return self.first_token_s - self.start_s', _ROWS),
    Defect("time per output token counts the first token", "experiments/results/request_rows.py",
        "per_sequence / steps", "per_sequence / (steps + 1)", _ROWS),
    Defect("imbalance is of the mean", "analysis/data/metrics.py",
        "(largest / mean).fillna(1.0)", "(mean / mean).fillna(1.0)", _METRICS),
    Defect("shares are of the largest whole", "analysis/data/metrics.py",
        "(rows.sums[part] / rows.sums[whole]).fillna(0.0)", "(rows.sums[part] / rows.sums[whole].max()).fillna(0.0)",
        _METRICS),
    Defect("percentiles are off", "analysis/data/stats.py", "np.quantile(values, percent / 100)",
        "np.quantile(values, 0.5)", _SUMMARY),
    Defect("percentiles are told of any number of requests", "analysis/data/stats.py",
        "values.size < least_samples(percent)", "values.size < 1", _STATS),
    Defect("a request that keeps one of several limits is good", "results_schema/slo.py",
        "return all(", "return any(", "tests/analysis/data/test_serving.py"),
    Defect("a request's time per token counts its first token", "experiments/results/request_rows.py",
        "self.decode_s / len(self.later_s)", "self.decode_s / (1 + len(self.later_s))", _ROWS),
    Defect("a rank serves more requests than it has room for", "experiments/measure/schedule.py",
        "if len(self.running[rank]) + len(taken[rank]) == self.batch_size", "if len(taken[rank]) == self.batch_size",
        "tests/experiments/measure/test_schedule.py"),
    Defect("shorter sequences see their padding", "harmoeny/models/kit/sequences.py",
        "mask = torch.arange(longest) >=", "mask = torch.arange(longest) >= 0 *",
        "tests/harmoeny/models/kit/test_sequences.py"),
    Defect("ratios are not paired by round", "analysis/data/summary.py",
        '.set_index("round").sort_index()', '.sort_values("throughput_tokens_per_s")', _SUMMARY),
    Defect("the ratio is one of medians", "analysis/data/stats.py",
        "        ratios = a / b\n", "        ratios = np.array([np.median(a) / np.median(b)])\n", _STATS),
    Defect("rounds of different measurements are paired", "analysis/data/pairing.py",
        'references.get(_together(run) or "")', "next(iter(references.values()), None)", _PAIRING),
    Defect("mirrored rounds are not averaged", "results_schema/paired.py",
        "if len(ratios) >= ENOUGH_TO_AVERAGE:", "if not ratios:", _PAIRED),
    Defect("rounds in which the machine moved count like others", "results_schema/paired.py",
        "max(1, sum(of_calm))", "len(of_calm)", _PAIRED),
    Defect("a bound or a dropping system may be the baseline", "analysis/data/summary.py",
        'if kind["exact"] and kind["baseline"] and not kind["bound"]', "if kind", _SUMMARY),
    Defect("a verdict from one round", "analysis/report/html/headline.py",
        "    if ratio.n == 1:\n        return _ONE_ROUND\n", "", "tests/analysis/report/html/test_headline.py"),
    Defect("simulated ranks do not wait for the last one", "experiments/simulator/advance.py",
        "boundary_s[Phase.METADATA].max() + cost.metadata_s", "boundary_s[Phase.METADATA] + cost.metadata_s", _ADVANCE),
    Defect("simulated fetches are not waited for", "experiments/simulator/virtual.py",
        "        self.now_s = end_s\n        return span\n", "        return span\n", _VIRTUAL),
    Defect("simulated copies cost the processor nothing", "experiments/simulator/virtual.py",
        "self.now_s += seconds + self.owed_s", "self.now_s += seconds", _VIRTUAL),
    Defect("a system that loses tokens is simulated", "experiments/simulator/backend.py",
        "        if problem := _plan_problem(", "        if False and _plan_problem(",
        "tests/experiments/simulator/test_backend.py::test_a_system_with_wrong_plans_has_no_rows_but_a_reason"),
    Defect("results are combined with wrong routing weights", "harmoeny/runtime/exchange/dispatch.py",
        "dispatched.bring_back(results_RH), routing_weights_TK,",
        "dispatched.bring_back(results_RH), 2.0 * routing_weights_TK,", _ENGINE),
    Defect("results are combined with the routing weights of the next token", "harmoeny/runtime/exchange/dispatch.py",
        "dispatched.bring_back(results_RH), routing_weights_TK,",
        "dispatched.bring_back(results_RH), routing_weights_TK.roll(1, 0),", _ENGINE),
    Defect("an expert computes before its weights are there", "harmoeny/runtime/memory/fetch/base.py",
        "                    self._wait(slots[slot], self._stats)\n", "                    pass\n", _FETCH),
    Defect("waits for fetches are not counted", "harmoeny/runtime/memory/fetch/base.py",
        "(stats.fetch_waits if fetched else stats.restore_waits).append(stalled)", "pass",
        _VIRTUAL),
    Defect("weights that a new placement moves are not counted", "harmoeny/runtime/memory/fetch/base.py",
        "        self._moved[layer].num_host_fetches += 1\n", "", _FETCH),
    Defect("the host brings the half that peers send", "harmoeny/runtime/memory/slots.py",
        "halves_of(buffer)[1].copy_(halves_of(source[name])[1]",
        "halves_of(buffer)[0].copy_(halves_of(source[name])[0]", _FETCH),
    Defect("a simulated half from the host takes nothing of its link", "experiments/simulator/virtual.py",
        "self._fetch(transfer, self.copy_s / 2)", "self._fetch(transfer, 0.0)", _VIRTUAL),
    Defect("all ranks read the first rank's sequences", "experiments/text/tokens.py",
        "(index * world_size + rank) * batch_size", "(index * world_size) * batch_size",
        "tests/experiments/datasets/test_datasets.py::TestTokens"),
    Defect("every batch reads the first one's text", "experiments/text/tokens.py",
        "(index * world_size + rank) * batch_size", "rank * batch_size",
        "tests/experiments/datasets/test_datasets.py::TestTokens"),
    Defect("the hidden share counts waits as hidden", "analysis/data/metrics.py",
        '(1 - sums["fetch_wait_s"] / sums["fetch_s"])', '(0 * sums["fetch_wait_s"] + 1)', _METRICS),
    Defect("intervals are of 50 % and not of 95 %", "analysis/data/stats.py",
        "np.quantile(medians, [_TAIL, 1 - _TAIL], axis=1)", "np.quantile(medians, [0.25, 0.75], axis=1)", _STATS),
    Defect("the open loop's waiting time begins when its batch does", "experiments/results/request_rows.py",
        'self.start_s - self.arrival_s', 'self.start_s - self.start_s', _ROWS),
    Defect("requests beyond the first batch are not served", "experiments/measure/serving.py",
        "while not self._schedule.done:", "if not self._schedule.done:",
        "tests/experiments/measure/test_requests.py"),
    Defect("a simulated exchange is as fast as its fastest rank", "experiments/simulator/cost.py",
        "self.topology.exchange_s(rows * float(self.work.row_bytes))",
        "0 * rows[0] + self.topology.exchange_s(rows * float(self.work.row_bytes)).min()", _ADVANCE),
    Defect("simulated host links are nobody else's", "experiments/simulator/topology.py",
        "min(own_rate, limit / (len(order) - place))", "own_rate",
        "tests/experiments/simulator/test_topology.py"),
    Defect("compiled code of earlier sources is used", "harmoeny/compiled.py",
        "locator.get_cache_path(), name, _source_stamp(function, locator)",
        "locator.get_cache_path(), name, locator.get_source_stamp()", "tests/harmoeny/test_compiled.py"),
    Defect("functions of a file that a type was taken from first do not count", "harmoeny/compiled.py",
        "if found.get(path):", "if path in found:", "tests/harmoeny/test_compiled.py"),
    Defect("a predicted layer does not wait for its fetches", "harmoeny/predict.py",
        "rank_s = max(arrived_s + held_s + lost_s, there_s)", "rank_s = arrived_s + held_s + lost_s",
        "tests/harmoeny/test_predict.py"),
    Defect("a rank begins more rows than it has", "harmoeny/head_start.py",
        "early[rank, experts[i]] = min(rows[i], left)", "early[rank, experts[i]] = min(rows[i], left) + 1",
        "tests/harmoeny/test_head_start.py"),
    Defect("rows are begun that take less than beginning them", "harmoeny/head_start.py",
        "if budget_s < 2 * once_s:", "if budget_s < once_s:", "tests/harmoeny/test_head_start.py"),
    Defect("a link that serves ranks in turns is taken for one of each rank's own", "harmoeny/runtime/calibrate.py",
        "return span_s((begins[0], begins[-1])) / (len(begins) - 1)", "return span_s(copies[0].span)",
        "tests/harmoeny/runtime/test_calibrate_device.py"),
    Defect("records leave out early rows", "experiments/results/layer_rows.py",
        "+ early_by_expert\n", "+ 0 * early_by_expert\n", _ROWS),
    Defect("a fetch needs no slot", "harmoeny/predict.py",
        "if sources.waiting[rank] == 0:", "if True:", "tests/harmoeny/test_predict.py"),
    Defect("what comes last is added up before it is there", "harmoeny/runtime/layer/staged.py",
        "return len(self._returning) - bool(self.last_rows)", "return 0", _STAGED),
    Defect("nothing is added up before the last results are there", "harmoeny/runtime/layer/staged.py",
        "if len(self._travelling) < 2:", "if True:", _STAGED),
    Defect("the last results are added twice", "harmoeny/runtime/exchange/gather.py",
        "if later:\n        bounds", "if False:\n        bounds", "tests/harmoeny/runtime/exchange/test_gather.py"),
    Defect("rows of several experts are taken to arrive in order", "harmoeny/runtime/exchange/order.py",
        "for axis in (1, 0)) <= 1:", "for axis in (1, 0)) <= 2:", "tests/harmoeny/runtime/exchange/test_order.py"),
    Defect("simulated results are added up before they are back", "experiments/simulator/exchange.py",
        "np.maximum(before_s + exchange.add_s - last_s, free_s)", "(before_s + exchange.add_s - last_s)", _ADVANCE),
    Defect("a plan stays at home although moving pays", "harmoeny/balance.py",
        "return evens == 0 and (most_spread == 0 or not spread)", "return (most_spread == 0 or not spread)",
        "tests/harmoeny/test_balance.py"),
    Defect("a plan's assignments get lost in moves", "harmoeny/level.py",
        "shares[receiver, expert] -= amount", "shares[receiver, expert] -= amount + 1",
        "tests/harmoeny/test_balance.py"),
    Defect("a simulated wave is launched once per expert", "experiments/simulator/cost.py",
        "waves_s = np.where(active > 0, self._hardware.expert_launch_s, 0.0)",
        "waves_s = active * self._hardware.expert_launch_s", _ADVANCE),
    Defect("simulated systems drift apart", "experiments/simulator/backend.py",
        "point.options.world_size, point.options.seed)",
        "point.options.world_size, point.options.seed + list(point.systems).index(name))",
        "tests/experiments/simulator/test_jitter.py"),
    Defect("simulated requests do not wait for the batch before them", "experiments/simulator/open_loop.py",
        "now_s, number = float(end_s.max()), number + 1", "number += 1",
        "tests/experiments/simulator/test_loops.py"),
    Defect("edited code counts as the old", "experiments/results/kept.py",
        "    return not any(_changed(folder.manifest, point))\n", "    return True\n", _KEPT),
    Defect("other weights count as the old", "harmoeny/models/kit/fingerprint.py",
        "    if weights:\n", "    if False:\n", "tests/harmoeny/models/kit/test_fingerprint.py"),
    Defect("a CPU quota counts for nothing", "harmoeny/cores.py",
        "    if quota is not None and quota < pinned:\n", "    if False:\n", "tests/harmoeny/test_cores.py"),
    Defect("a processor's copies cost its rank nothing", "harmoeny/predict.py",
        "        lost_s = costs.copy_share * sources.host_link_s[rank]\n", "        lost_s = 0.0\n",
        "tests/harmoeny/test_predict.py"),
    Defect("ranks that share cores are taken for alone", "harmoeny/predict.py",
        "number / len(busy_s))", "0.0)",
        "tests/harmoeny/test_predict.py"),
    Defect("a policy's first placement is compiled while it is timed", "harmoeny/runtime/layer/residency.py",
        "        for _ in range(num_batches):\n", "        for _ in range(0):\n",
        "tests/harmoeny/runtime/layer/test_residency.py"),
    Defect("a rehearsal teaches the policy", "harmoeny/runtime/layer/residency.py",
        "deepcopy(self._policy)", "self._policy", "tests/harmoeny/runtime/layer/test_residency.py"),
)  # fmt: skip


def find(names: Sequence[str]) -> list[Defect]:
    """Return the defects whose names contain one of ``names``, all where there are none."""
    return [defect for defect in DEFECTS if not names or any(name in defect.name for name in names)]


def stale() -> list[str]:
    """Return the names of defects whose place in the code is not there exactly once."""
    return [
        defect.name for defect in DEFECTS if (ROOT / defect.file).read_text(encoding="utf-8").count(defect.right) != 1
    ]


@contextmanager
def planted(defect: Defect, root: Path) -> Iterator[None]:
    """Edit a copy of the project, and undo it afterwards."""
    path = root / defect.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(defect.right, defect.wrong), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(right, encoding="utf-8")


def noticed_by(defect: Defect, root: Path) -> str | None:
    """Return the test that fails with the defect; None: all pass."""
    with planted(defect, root):
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile", "unshrunk")
        command = [sys.executable, "-m", "pytest", *options, defect.tests]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(root / "numba"), "PYTHONPATH": str(root)}
        done = subprocess.run(  # noqa: S603  (our own tests)
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    failed = [
        line.removeprefix("FAILED ").partition(" - ")[0]
        for line in done.stdout.splitlines()
        if line.startswith("FAILED ")
    ]
    if done.returncode != (1 if failed else 0):
        raise RuntimeError(f"{defect.name}: the tests did not run:\n{done.stdout}{done.stderr}")
    return failed[0] if failed else None


def copy_of_project(folder: Path) -> Path:
    """Copy what the tests need to a new folder."""
    for name in _COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "results").symlink_to(ROOT / "results")
    return folder


def main() -> None:
    """Plant every defect and report."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="parts of the names of defects; none: all")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/trust.md")
    arguments = parser.parse_args()
    if gone := stale():
        sys.exit(f"error: not there any more, or several times: {', '.join(gone)}")
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_project(Path(folder))
        for defect in find(arguments.names):
            test = noticed_by(defect, root)
            if test is None:
                unnoticed.append(defect.name)
            where = f"`{defect.file}`", f"`{test.partition('::')[2]}`" if test else "**nothing**"
            print(
                f"| {defect.name} | {' | '.join(where)} |" if arguments.markdown else f"{defect.name}: {test}",
                flush=True,
            )
    if unnoticed:
        sys.exit(f"error: no test notices: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
