from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.routers.base import RoutingRequest
from experiments.routers.trace import TraceRouter
from experiments.routing.trace_files import read_about, read_trace
from scripts.traces import main
from tests.experiments.routing.formats import recorded as r


def test_an_imported_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = r.choices()
    files = r.megatron(tmp_path, chosen)
    out = tmp_path / "trace.parquet"
    assert main(["import", *map(str, files), "--out", str(out), "--model", "m", "--dataset", "d"]) == 0
    assert "3 batches of 80 tokens (median), 2 MoE layers, 6 experts, top-2, 2 ranks" in capsys.readouterr().out
    assert read_about(out)["run_id"] == "import-megatron"
    router = TraceRouter(path=str(out))
    router.validate(r.EXPERTS, r.TOP_K)
    request = RoutingRequest(
        num_tokens=r.TOKENS, num_experts=r.EXPERTS, top_k=r.TOP_K, batch=1, layer=1, rank=1, seed=0, world_size=r.RANKS
    )
    np.testing.assert_array_equal(router.count(request), r.counts_of(chosen)[1, 1, 1])


def test_a_trace_is_described_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = r.megatron(tmp_path, r.choices())
    for paths in ([], ["--token-paths"]):
        command = ["describe", *map(str, files), "--out", str(tmp_path / "figures"), "--ranks", "3", *paths]
        assert main(command) == 0
        said = capsys.readouterr().out
        assert "format:      megatron" in said
        assert "largest over mean load of 3 ranks" in said
        assert (tmp_path / "figures" / "router_trace_rank0.png").stat().st_size > 10_000
    one = r.mindspeed(tmp_path, r.choices())
    assert main(["describe", str(one[0]), "--top-k", "2", "--out", str(tmp_path)]) == 0
    assert "drift" not in capsys.readouterr().out


def test_a_trace_is_converted(tmp_path: Path) -> None:
    trace = tmp_path / "trace.parquet"
    files = r.megatron(tmp_path, r.choices())
    assert main(["import", *map(str, files), "--out", str(trace)]) == 0
    assert main(["convert", str(trace), "--to", "vllm", "--out", str(tmp_path / "window.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "window.npy"), read_trace(trace).counts.sum(axis=2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "nowhere", "--out", "x.parquet"], "error: nowhere: cannot be read"),
        (["import", "nowhere", "--out", "x.csv"], "error: --out: 'x.csv', must end in .parquet"),
        (["import", "nowhere", "--out", "x.parquet", "--merge", "0"], "error: --merge: 0, must be at least 1"),
        (["import", "nowhere", "--out", "x.parquet", "--top-k", "0"], "error: --top-k: 0, must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
