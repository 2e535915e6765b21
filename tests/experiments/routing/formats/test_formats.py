from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.routing.formats.base import ReadOptions
from experiments.routing.formats.json_stream import elements
from experiments.routing.formats.olmoe import load_plain
from experiments.routing.formats.read import FORMATS, read_routing, recognise
from experiments.routing.trace import RecordedRouting
from experiments.routing.trace_files import write_trace
from tests.experiments.routing.formats import recorded as r
from tests.experiments.routing.test_trace import random_trace


def read(files: list[Path], **options: Any) -> RecordedRouting:
    ways = {name: options.pop(name) for name in ("merge", "num_batches", "token_paths") if name in options}
    return read_routing(files, ReadOptions(**options), ("model", "text"), **ways)


@pytest.mark.parametrize("case", r.BY_BATCH)
def test_counts_of_every_batch_are_read(case: str, tmp_path: Path) -> None:
    name, write = r.BY_BATCH[case]
    chosen = r.choices()
    files = write(tmp_path, chosen)
    assert recognise(files).name == name
    trace = read(files, top_k=r.TOP_K)
    expected = r.counts_of(chosen)
    if trace.world_size == 1:
        expected = expected.sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(trace.counts, expected)
    np.testing.assert_array_equal(trace.num_tokens, expected.sum(axis=3) // r.TOP_K)
    assert (trace.top_k, trace.model, trace.dataset) == (r.TOP_K, "model", "text")


def test_what_is_not_recorded_by_batch_is_one_batch(tmp_path: Path) -> None:
    chosen = r.choices()
    files = r.mindspeed(tmp_path, chosen)
    assert recognise(files).name == "mindspeed"
    trace = read(files, top_k=r.TOP_K)
    np.testing.assert_array_equal(trace.counts, r.counts_of(chosen).sum(axis=(0, 2))[None, :, None])


def test_requests_have_two_phases(tmp_path: Path) -> None:
    chosen = r.choices()
    files = r.requests(tmp_path, chosen)
    assert recognise(files).name == "requests"
    prompts = read(files, phase="prefill")
    np.testing.assert_array_equal(prompts.counts[:, :, 0], r.counts_of(chosen)[0].swapaxes(0, 1))
    steps = read(files, phase="decode", num_experts=r.EXPERTS)
    assert steps.num_batches == 2 * r.TOKENS, "the longer request goes on alone"
    np.testing.assert_array_equal(steps.num_tokens[:, 0, 0], [2] * (2 * r.TOKENS - 10) + [1] * 10)
    first = np.zeros((r.LAYERS, r.EXPERTS), dtype=np.int64)
    for layer, rank in np.ndindex(r.LAYERS, r.RANKS):
        first[layer, chosen[1][layer][rank][0]] += 1
    np.testing.assert_array_equal(steps.counts[0, :, 0], first)


def test_own_traces_and_published_ones_are_recognised(tmp_path: Path) -> None:
    trace, _ = random_trace(0, world_size=2, path=str(tmp_path / "t.parquet"))
    write_trace(trace, "run")
    found = read([tmp_path / "t.parquet"])
    np.testing.assert_array_equal(found.counts, trace.counts)
    np.testing.assert_array_equal(found.num_tokens, trace.num_tokens)
    csv = tmp_path / "freq.csv"
    csv.write_text(",dataset,iteration,layer_idx,0,1\n0,books,0,0,3,4\n1,news,0,0,5,6\n")
    assert read([csv], case="news").counts.tolist() == [[[[5, 6]]]]
    with pytest.raises(ValueError, match=r"--case: None, must be one of books, news"):
        read([csv])


def test_paths_of_tokens_are_kept_where_they_are_recorded(tmp_path: Path) -> None:
    chosen = r.choices()
    trace = read(r.megatron(tmp_path, chosen), token_paths=True)
    for batch, layer, rank in np.ndindex(r.BATCHES, r.LAYERS, r.RANKS):
        np.testing.assert_array_equal(trace.paths[batch, layer, rank], chosen[batch][layer][rank])
    with pytest.raises(ValueError, match="only counts are recorded, so there are no paths"):
        read(r.vllm_array(tmp_path, chosen), top_k=r.TOP_K, token_paths=True)


@pytest.mark.parametrize("case", ["megatron", "vllm array"])
def test_batches_are_merged_and_cut(case: str, tmp_path: Path) -> None:
    chosen = r.choices()
    files = r.BY_BATCH[case][1](tmp_path, chosen)
    merged = read(files, top_k=r.TOP_K, merge=2, token_paths=case == "megatron")
    np.testing.assert_array_equal(
        merged.counts.sum(axis=2), r.counts_of(chosen)[:2].sum(axis=(0, 2))[None], "the third is left over"
    )
    if case == "megatron":
        assert merged.num_tokens.tolist() == [[[2 * r.TOKENS] * r.RANKS] * r.LAYERS]
        np.testing.assert_array_equal(merged.paths[0, 1, 0], np.concatenate([chosen[0][1][0], chosen[1][1][0]]))
    assert read(files, top_k=r.TOP_K, num_batches=1).num_batches == 1
    with pytest.raises(ValueError, match="fewer than 4 batches"):
        read(files, top_k=r.TOP_K, merge=4)


def test_one_step_alone_may_stand_without_a_list_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text('{"logical_count": [[1, 2, 3], [3, 0, 3]]}')
    assert read([path], top_k=2).counts.tolist() == [[[[1, 2, 3]], [[3, 0, 3]]]]


@pytest.mark.parametrize("name", ["sglang", "vllm", "mindspeed"])
def test_what_is_converted_is_read_again(name: str, tmp_path: Path) -> None:
    trace = read(r.megatron(tmp_path, r.choices()))
    out = tmp_path / {"sglang": "out.json", "vllm": "out.npy", "mindspeed": "out.json"}[name]
    FORMATS[name].write(trace, out)
    assert recognise([out]).name == name
    found = read([out], top_k=r.TOP_K).counts
    whole = trace.counts.sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(found, whole.sum(axis=0, keepdims=True) if name == "mindspeed" else whole)


def _lines(path: Path, change: Any) -> list[Path]:
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))
    return sorted(path.parent.glob("*.jsonl"))


def _edited(field: str, value: Any) -> Any:
    def change(lines: list[str]) -> None:
        lines[3] = json.dumps(json.loads(lines[3]) | {field: value}) + "\n"

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.__setitem__(3, lines[3][:50]), r"rank1.jsonl: line 4: cut off or no JSON"),
        (lambda lines: lines.pop(3), r"line 3: step 1 of rank 1 has layers decoder 3, must be decoder 3, mtp 0 3"),
        (lambda lines: lines.__delitem__(slice(4, 6)), r"line 5: step 2 is not in .*rank1.jsonl"),
        (_edited("num_tokens", 7), r"rank1.jsonl: line 4: experts of 40 tokens, must be num_tokens=7"),
        (_edited("topk", 3), r"rank1.jsonl: line 4: experts of tokens must be lists of whole numbers, 3 for"),
        (_edited("top_indices", [[1, 1]] * 40), r"layer mtp 0 3: a token has an expert twice"),
        (_edited("top_indices", [[1, -2]] * 40), r"layer mtp 0 3: expert -2, must be at least 0"),
        (_edited("top_indices", [["a", "b"]] * 40), r"rank1.jsonl: line 4: experts of tokens must be lists"),
        (_edited("rank", 0), r"rank1.jsonl: line 4: rank 0, must be 1 as in the line before"),
    ],
)
def test_damaged_lines_are_named(change: Any, message: str, tmp_path: Path) -> None:
    r.megatron(tmp_path, r.choices())
    files = _lines(tmp_path / "router_trace_rank1.jsonl", change)
    with pytest.raises(ValueError, match=message):
        read(files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"load_history": [{"logical_expert_load": [[1, 2]]}, {"logical_expert', "element 1 is cut off or damaged"),
        ('{"load_history": [{"other": 1}]}', "window 0: has no logical_expert_load"),
        ('{"load_history": [{"logical_expert_load": [[1, -2]]}]}', "window 0: counts of type int64, must be whole"),
        ('{"load_history": [{"logical_expert_load": [[1, 2.5]]}]}', "window 0: counts of type float64, must be whole"),
        ('{"load_history": [{"logical_expert_load": [[1, 2], [3]]}]}', "window 0: counts of shape"),
        ('{"0": {"0": 3, "x": 4}}', "layer 0: expert 'x' has 4, must be whole numbers"),
        ('{"0": {"0": 3}, "1": 4}', "layer 1: int, must be assignments by expert"),
        ('{"0": {"0": 3}', "no readable JSON"),
        ('[{"1": [[0, 1]]}, {"1": [[0, 1, 2]]}, {"2": [[0, 1]]}]', "layers 2 on 1 ranks"),
        ('[{"1": [[0, 1]]}, {"1": [[0, 1, 2]]}, {"1": [[0, 1]]}]', "with 2 experts per token, must be .*with 3"),
        ('[{"1": [[0, 1]]}, {"1": [[0, 0]]}]', "element 1: layer 1: a token has an expert twice"),
        ('{"logical_count": [[[1, 2]], [[3, "a"]]]}', "step 1: counts of type"),
        ('{"logical_count": [[[1, 2]], [[3, 4]', "element 1 is cut off or damaged"),
        ('{"logical_count": [[[1, 2], [3]]]}', r"step 0: counts of shape"),
        ('{"logical_count": 3}', "has no list 'logical_count'"),
        ("hello", "no known format of recorded routing, must be one of harmoeny, published, sglang"),
    ],
)
def test_wrong_json_is_refused_by_file_and_row(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        read([path], top_k=1 if "load" in content or "count" in content or '{"0' in content else None)
    assert str(path) in str(refused.value)


def test_what_counts_leave_open_must_be_said(tmp_path: Path) -> None:
    files = r.vllm_array(tmp_path, r.choices())
    with pytest.raises(ValueError, match="window 0: only counts are recorded: --top-k must say"):
        read(files)
    with pytest.raises(
        ValueError, match=r"window 0: layer 0: an expert has \d+ of 160 assignments, more than .* \(16\)"
    ):
        read(files, top_k=10)
    with pytest.raises(ValueError, match="window 0: 6 experts, must be 7"):
        read(files, top_k=r.TOP_K, num_experts=7)
    with pytest.raises(ValueError, match=r"expert 5, must be below 4 \(--num-experts\)"):
        read(r.megatron(tmp_path, r.choices()), num_experts=4)
    with pytest.raises(ValueError, match="2 experts per token, not --top-k 3"):
        read(r.megatron(tmp_path, r.choices()), top_k=3)


def test_files_of_different_recordings_are_told_apart(tmp_path: Path) -> None:
    files = [*r.vllm_array(tmp_path, r.choices()), *r.mindspeed(tmp_path, r.choices())]
    with pytest.raises(ValueError, match=r"token_collects_all.json: mindspeed, must be vllm as .*window.npy"):
        read(files)
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        read([tmp_path / "nowhere"])


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/should-never-be-there",)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "attack.pkl"
    path.write_bytes(pickle.dumps([Counter({_Attack(): 1})]))
    with pytest.raises(ValueError, match=r"attack.pkl: refused \(names posix.system, must hold counters"):
        load_plain(path)
    torch.save({"records": _Attack()}, tmp_path / "attack.pt")
    with pytest.raises(ValueError, match=r"no readable file of torch\.save"):
        read([tmp_path / "attack.pt"])
    assert not Path("/tmp/should-never-be-there").exists()


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "counts.pkl"
    path.write_bytes(pickle.dumps([Counter({np.int64(3): 4, np.int64(0): 2})], protocol=protocol))
    assert load_plain(path) == [{3: 4, 0: 2}]


def test_elements_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.routing.formats.json_stream._CHUNK", 7)
    content = [{"a": [1, 2, {"b": "],[{"}]}, [], [[3]], {"long": "x€" * 300}]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    assert list(elements(path)) == content
    path.write_text(json.dumps({"other": {"x": 1}, "wanted": content}))
    assert list(elements(path, "wanted")) == content
    path.write_text(json.dumps({"wanted": content})[:-1] + ", cut off here does not matter")
    descriptors = Path("/dev/fd")
    num_open = len(list(descriptors.iterdir()))
    started = [elements(path, "wanted") for _ in range(20)]
    assert [next(one) for one in started] == [content[0]] * 20
    assert len(list(descriptors.iterdir())) == num_open, "any number of files can be read beside each other"
