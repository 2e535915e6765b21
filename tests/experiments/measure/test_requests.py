"""The open loop and the decode phase, on real ranks and by parts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.launch.rank import run_rank
from experiments.measure.batch import Batch
from experiments.measure.decode import DecodeBatch, make_decode_batch
from experiments.measure.pool import Pool
from experiments.point.request_options import RequestOptions
from experiments.results.begun import BegunRun
from experiments.routing.trace_files import read_trace
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.runtime.exchange.comm import Communicator
from tests.conftest import Load
from tests.experiments.runs import begin, set_up
from tests.ranks import run_ranks

STEPS, ROUNDS, REQUESTS = 4, 2, 11
OPEN = ("requests.arrivals=poisson", "requests.rate_per_s=200")


class TestArrivals:
    def test_random_ones_have_their_rate_and_differ_by_round_only(self) -> None:
        options = RequestOptions(arrivals="poisson", rate_per_s=20.0)
        times = options.times(seed=1, round_index=0, default=4000)
        assert len(times) == 4000
        gaps = np.diff(times, prepend=0.0)
        assert (gaps >= 0).all()
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
        assert gaps.std() == pytest.approx(1 / 20, rel=0.1)  # as only exponential gaps have it
        np.testing.assert_array_equal(times, options.times(1, 0, 4000))
        assert (times != options.times(1, 1, 4000)).all()

    @pytest.mark.parametrize("cv", [0.4, 1.0, 2.5])
    def test_gamma_has_the_rate_and_the_variation_that_were_asked_for(self, cv: float) -> None:
        times = RequestOptions(arrivals="gamma", rate_per_s=20.0, cv=cv).times(seed=3, round_index=0, default=40_000)
        gaps = np.diff(times, prepend=0.0)
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)

    def test_gamma_with_a_cv_of_one_is_poisson(self) -> None:
        # Kolmogorov and Smirnov: the largest distance to 1 - exp(-rate t) stays below 1.63 / sqrt(n) in 99 % of draws.
        for options, is_poisson in (
            (RequestOptions(arrivals="poisson", rate_per_s=20.0), True),
            (RequestOptions(arrivals="gamma", rate_per_s=20.0, cv=1.0), True),
            (RequestOptions(arrivals="gamma", rate_per_s=20.0, cv=1.3), False),
        ):
            gaps = np.sort(np.diff(options.times(seed=5, round_index=0, default=4000), prepend=0.0))
            exponential = 1 - np.exp(-20.0 * gaps)
            distance = np.abs(exponential - (np.arange(len(gaps)) + 0.5) / len(gaps)).max()
            assert (distance < 1.63 / np.sqrt(len(gaps))) == is_poisson, options

    @pytest.mark.parametrize("options", [{"arrivals": "poisson"}, {"arrivals": "gamma", "cv": 2.0}])
    def test_another_rate_has_the_same_times_closer_together(self, options: dict[str, Any]) -> None:
        requests = RequestOptions(**options, rate_per_s=2.0, rate_step=2.0, max_rates=3)
        assert requests.rates() == [2.0, 4.0, 8.0]
        slow, fast = (requests.times(seed=1, round_index=0, default=50, rate_per_s=rate) for rate in (2.0, 8.0))
        np.testing.assert_allclose(slow, 4 * fast)
        np.testing.assert_array_equal(slow, requests.times(seed=1, round_index=0, default=50))

    def test_recorded_ones_start_at_zero(self, tmp_path: Path) -> None:
        path = tmp_path / "times"
        path.write_text("7.5\n7.5\n8\n10\n")
        assert RequestOptions(arrivals=str(path)).times(0, 3, 99).tolist() == [0.0, 0.0, 0.5, 2.5]
        assert RequestOptions(arrivals=str(path), per_round=2).times(0, 0, 99).tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_marks_empty_lines_and_packing_do_no_harm(self, encoding: str, tmp_path: Path) -> None:
        path = tmp_path / "times"
        for pack in (bytes, gzip.compress):
            path.write_bytes(pack("\n1.5\r\n 2 \r\n\r\n4\r\n\n".encode(encoding)))
            assert RequestOptions(arrivals=str(path)).times(0, 0, 9).tolist() == [0.0, 0.5, 2.5]

    def test_what_is_no_text_is_refused_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "times"
        for content, reason in ((bytes(range(256)), "is no text"), (gzip.compress(b"1\n2\n")[:-9], "is damaged")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"^requests\.arrivals: '.*/times' {reason}"):
                RequestOptions(arrivals=str(path)).validate()

    @pytest.mark.parametrize(
        ("options", "text", "message"),
        [
            ({"arrivals": "poisson"}, "", "requests.rate_per_s: None, must be above 0"),
            ({"arrivals": "poisson", "rate_per_s": 0.0}, "", "requests.rate_per_s: 0.0, must be above 0"),
            ({"rate_per_s": 1.0}, "", "requests.rate_per_s: 1.0, must be null without"),
            ({"per_round": 3}, "", "requests.per_round: 3, must be null with requests.arrivals=closed"),
            (
                {"arrivals": "poisson", "rate_per_s": 1.0, "per_round": 0},
                "",
                "requests.per_round: 0, must be at",
            ),
            ({"arrivals": "gamma", "rate_per_s": 1.0}, "", "requests.cv: None, must be above 0 with arrivals=gamma"),
            ({"arrivals": "gamma", "rate_per_s": 1.0, "cv": 0.0}, "", "requests.cv: 0.0, must be above 0"),
            ({"arrivals": "gamma", "cv": 1.0}, "", "requests.rate_per_s: None, must be above 0 with arrivals=gamma"),
            ({"arrivals": "poisson", "rate_per_s": 1.0, "cv": 1.0}, "", "requests.cv: 1.0, must be null without"),
            ({"output_tokens": 2}, "", "requests.output_tokens: 2, must be 1 with requests.arrivals=closed"),
            ({"output_tokens": 0}, "", "requests.output_tokens: 0, must be at least 1"),
            (
                {"rate_step": 2.0},
                "",
                "requests.rate_step: 2.0, must be null without requests.arrivals=poisson or gamma",
            ),
            ({"arrivals": "FILE", "rate_step": 2.0}, "1\n", "requests.rate_step: 2.0, must be null without"),
            (
                {"arrivals": "poisson", "rate_per_s": 1.0, "rate_step": 1.0},
                "",
                "requests.rate_step: 1.0, must be above 1, or null",
            ),
            ({"max_rates": 0}, "", "requests.max_rates: 0, must be at least 1"),
            ({"arrivals": "no"}, "", "requests.arrivals: 'no', must be closed, poisson, gamma or a file"),
            ({"arrivals": "FILE"}, "1\nx\n", "requests.arrivals: line 2 of .* is 'x', must be a time in s"),
            ({"arrivals": "FILE"}, "2\n1\n", "requests.arrivals: line 2 of .* is '1', must be a time in s, not before"),
            ({"arrivals": "FILE"}, "", "requests.arrivals: '.*' is empty"),
            ({"arrivals": "FILE", "per_round": 3}, "1\n2\n", "requests.per_round: 3, must be at most 2"),
        ],
    )
    def test_bad_ones_are_refused(self, options: dict[str, Any], text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "times").write_text(text)
        options = {k: str(tmp_path / "times") if v == "FILE" else v for k, v in options.items()}
        with pytest.raises(ValueError, match=f"^{message}"):
            RequestOptions(**options).validate()


def test_a_request_keeps_its_tokens_and_routing_in_whichever_batch() -> None:
    batch = Batch(torch.arange(12).view(3, 4), [torch.arange(24).view(12, 2), torch.arange(3).view(3, 1)])
    pool = Pool.gather(batch, Communicator(torch.device("cpu")))
    taken = pool.prompts([2, 0, 5])  # the sixth request is the third sequence again
    assert taken.input_ids.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert taken.expert_ids[0].view(3, -1).tolist() == [list(range(16, 24)), list(range(8)), list(range(16, 24))]
    assert taken.expert_ids[1].tolist() == [[2], [0], [2]]
    nothing = pool.prompts([])
    assert all((ids == -1).all() for ids in nothing.expert_ids)
    assert len(nothing.expert_ids[0]) == 4


def test_a_request_keeps_its_further_tokens_too() -> None:
    prompt = Batch(torch.zeros(2, 3, dtype=torch.int64), [torch.zeros(6, 1, dtype=torch.int64)])
    steps = [[torch.tensor([[10 * step], [10 * step + 1]])] for step in range(3)]
    decode = DecodeBatch(prompt, torch.tensor([[1, 2], [3, 4], [5, 6]]), steps, torch.zeros(2, 7))
    pool = Pool.gather(prompt, Communicator(torch.device("cpu")), decode)
    taken = pool.step([3, 0], [2, 3])  # the second sequence's second token, and the first one's third
    assert taken.input_ids.tolist() == [[4], [5]]
    assert taken.expert_ids[0].tolist() == [[11], [20]]
    assert pool.step([], []).expert_ids[0].tolist() == [[-1]]


def test_decode_computes_what_the_model_computes_without_keys_and_values(load: Load) -> None:
    point = load(
        "model=qwen3_tiny", "world_size=1", "batch_size=3", "seq_len=9", "dataset=random", "router=model", "rounds=1",
        f"decode_tokens={STEPS}",
    )  # fmt: skip
    with torch.inference_mode():
        bench = set_up(point)
        model, prompt = bench.model, bench.batches[0]
        batch = make_decode_batch(bench, prompt, 0, STEPS)
        assert batch.tokens.shape == (STEPS, 3)
        model.context.dense = True
        ids = prompt.input_ids
        for tokens, expert_ids in zip(batch.tokens, batch.expert_ids, strict=True):
            model.context.tape.pin(None)
            logits = model.forward(ids)
            assert (logits.argmax(dim=-1) == tokens).all()  # greedy
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            # The step's routing is that of the last position.
            model.context.tape.pin(None)
            logits = model.forward(ids)
            for whole, step in zip(model.context.tape.recorded, expert_ids, strict=True):
                assert (whole.view(3, -1, whole.shape[1])[:, -1] == step).all()
        assert torch.allclose(logits, batch.logits, atol=1e-5)
        bench.rig.close()


def test_phases_that_a_model_or_router_has_not_are_refused(load: Load) -> None:
    for options, message in {
        ("model=switch_tiny", "decode_tokens=2"): "decode_tokens: 2, must be 0: model=switch is no decoder",
        ("decode_tokens=-1",): "decode_tokens: -1, must be at least 0",
        ("requests.arrivals=poisson",): "requests.rate_per_s: None, must be above 0",
        (*OPEN, "model=switch_tiny", "requests.output_tokens=3"): (
            "requests.output_tokens: 3, must be 1: model=switch is no decoder"
        ),
        (*OPEN, "requests.rate_step=2"): "requests.rate_step: 2.0, must be null without limits",
        (*OPEN, "model=qwen3_tiny", "requests.output_tokens=9", "seq_len=32761"): (
            "seq_len \\+ requests.output_tokens - 1: 32769, must be at most"
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            load(*options)


def _measure(rank: int, runs: list[BegunRun], tokens: TokenFile) -> None:
    run_rank(runs, tokens)


@pytest.mark.ranks
def test_two_ranks_serve_every_request_once_and_decode(load: Load, tmp_path: Path) -> None:
    trace = tmp_path / "trace.parquet"
    point = load(
        "model=qwen3_tiny", "world_size=2", "batch_size=2", "seq_len=8", "dataset=random", f"decode_tokens={STEPS}",
        "system=[harmoeny,drop]", f"rounds={ROUNDS}", "warmup_rounds=0", "router.skew=0.4", "requests.arrivals=poisson",
        "requests.rate_per_s=200", f"requests.per_round={REQUESTS}", f"trace.record={trace}", "trace.token_paths=true",
    )  # fmt: skip
    run_ranks(2, _measure, tmp_path, begin(point), prepare_point(point))

    requests = pd.read_parquet(point.folder / "requests.parquet")
    served = requests[requests["loop"] == "open"]
    arrivals = {}
    for (system, round_index), rows in served.groupby(["system", "round"]):
        assert rows["request"].tolist() == list(range(REQUESTS))
        assert rows["rank"].tolist() == [i % 2 for i in range(REQUESTS)]
        assert rows["batch"].is_monotonic_increasing  # first come, first served
        assert rows["batch"].value_counts().max() <= 4
        assert (rows["queue_s"] >= 0).all()
        assert (rows["first_token_s"] > rows["start_s"]).all()
        ends = rows.groupby("batch")["first_token_s"].max()
        starts = rows.groupby("batch")["start_s"].min()
        assert (starts.iloc[1:].to_numpy() >= ends.iloc[:-1].to_numpy() - 1e-3).all()  # one batch after another
        arrivals[system, round_index] = rows["arrival_s"].tolist()
    assert len(arrivals) == 2 * ROUNDS
    for round_index in range(ROUNDS):
        expected = point.options.requests.times(point.options.seed, round_index, 0).tolist()
        assert arrivals["harmoeny", round_index] == arrivals["drop", round_index] == expected
    closed = requests[requests["loop"] == "closed"]
    iterations = pd.read_parquet(point.folder / "iterations.parquet").set_index(["system", "round"])["ttft_s"]
    pd.testing.assert_series_equal(
        closed.groupby(["system", "round"])["ttft_s"].mean(), iterations.sort_index(), check_exact=False
    )

    decode = pd.read_parquet(point.folder / "decode.parquet")
    assert len(decode) == 2 * ROUNDS
    assert set(decode["output_tokens"]) == {2 * 2 * STEPS}
    checks = json.loads((point.folder / "manifest.json").read_text())["checks"]
    assert checks["harmoeny"]["decode_error"] <= 1e-4
    assert "decode_error" not in checks["drop"]

    recorded = read_trace(trace)
    assert recorded.counts.shape == (ROUNDS, 2, 2, 8)
    assert (recorded.num_tokens == 2 * 8).all()
    assert len(recorded.paths) == ROUNDS * 2 * 2


@pytest.mark.ranks
def test_two_ranks_serve_requests_of_several_tokens_at_growing_rates(load: Load, tmp_path: Path) -> None:
    point = load(
        "model=qwen3_tiny", "world_size=2", "batch_size=2", "seq_len=8", "dataset=random", "system=[harmoeny,drop]",
        f"rounds={ROUNDS}", "warmup_rounds=0", "router.skew=0.4", "requests.arrivals=gamma", "requests.cv=2",
        "requests.rate_per_s=300", f"requests.per_round={REQUESTS}", f"requests.output_tokens={STEPS}",
        "requests.rate_step=3", "requests.max_rates=2", "slo.e2e_s=60",
    )  # fmt: skip
    run_ranks(2, _measure, tmp_path, begin(point), prepare_point(point))

    served = pd.read_parquet(point.folder / "requests.parquet").query("loop == 'open'")
    assert (served["output_tokens"] == STEPS).all()
    assert sorted(served["rate_per_s"].unique()) == [300, 900], "nobody takes a minute, so the second rate is measured"
    for _, rows in served.groupby(["rate_per_s", "system", "round"]):
        rate, round_index = float(rows["rate_per_s"].iloc[0]), int(rows["round"].iloc[0])
        assert rows["request"].tolist() == list(range(REQUESTS))
        expected = point.options.requests.times(point.options.seed, round_index, 0, rate)
        np.testing.assert_allclose(rows["arrival_s"], expected)
        gaps = np.stack(list(rows["itl_s"]))
        assert gaps.shape == (REQUESTS, STEPS - 1)
        assert (gaps > 0).all()
        np.testing.assert_allclose(gaps.sum(axis=1), rows["decode_s"])
        np.testing.assert_allclose(rows["tpot_s"] * (STEPS - 1), rows["decode_s"])
        ends = rows["first_token_s"] + rows["decode_s"]
        for start, rank in zip(rows["start_s"], rows["rank"], strict=True):
            running = (rows["rank"] == rank) & (rows["start_s"] <= start) & (start < ends - 1e-4)
            assert running.sum() <= 2, "batch_size is all that a rank has room for"
    checks = json.loads((point.folder / "manifest.json").read_text())["checks"]
    assert checks["harmoeny"]["decode_error"] <= 1e-4
