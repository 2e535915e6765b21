"""Results to draw: sweeps of skews, batch sizes and numbers of ranks, texts with the model's routing, changing skew."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from analysis.data.load import load_run, load_sweep
from analysis.figures.kit.base import FigureData, figure_data
from tests.analysis.figures.runs import COUNTS, OTHERS, SKEWS, STACKS
from tests.synthetic import (
    change_config,
    change_manifest,
    write_rates,
    write_routing,
    write_run,
    write_serving,
    write_sweep,
)


@pytest.fixture(scope="module")
def skews(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    sweep = load_sweep(write_sweep(tmp_path_factory.mktemp("results"), SKEWS))
    return figure_data(sweep.runs, sweep.points)


@pytest.fixture(scope="module")
def batches(skews: FigureData) -> FigureData:
    """The runs as if they were three batch sizes, the largest first."""
    sizes = skews.summary["router.skew"].map(dict(zip(SKEWS, (16, 4, 1), strict=True)))
    summary = skews.summary.assign(batch_size=sizes).drop(columns="router.skew")
    return FigureData(summary, ["batch_size"], skews.caption, skews.runs)


@pytest.fixture(scope="module")
def routed_texts(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Two data sets with the model's own routing: on the second one all tokens go to one expert."""
    folder = tmp_path_factory.mktemp("results")
    names = ["pydoc", "constant"]
    for i, name in enumerate(names):
        write_run(folder / name, seed=i, latency_s={k: [(1 + i) * s for s in v] for k, v in OTHERS.items()})
        counts = COUNTS if i == 0 else [[[100, 0, 0, 0]] * 2 + [[4, 0, 0, 0]]] * 3
        write_routing(folder / name, counts, STACKS, "model")
        change_manifest(folder / name, dataset={"name": name})
    return figure_data([load_run(folder / name) for name in names], [{"dataset": name} for name in names])


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    folder = tmp_path_factory.mktemp("results") / "run"
    write_run(folder, latency_s={name: OTHERS.get(name, [0.25] * 3) for name in (*OTHERS, "ideal")})
    write_routing(folder, COUNTS, STACKS, "dynamic")
    return figure_data([load_run(folder)], [{}])


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    folder = tmp_path_factory.mktemp("results") / "run"
    write_run(folder, predicts={"harmoeny"})
    return figure_data([load_run(folder)], [{}])


@pytest.fixture(scope="module")
def ranks_by_skew(skews: FigureData) -> FigureData:
    """The runs as if they were three numbers of ranks at one skew, and the same a little slower at another."""
    ranks = skews.summary["router.skew"].map(dict(zip(SKEWS, (2, 4, 8), strict=True)))
    first = skews.summary.assign(world_size=ranks, **{"router.skew": 0.0})
    slower = first["throughput_tokens_per_s"] / 2
    second = first.assign(throughput_tokens_per_s=slower, **{"router.skew": 0.9})
    return FigureData(pd.concat([first, second]), ["router.skew", "world_size"], skews.caption, skews.runs)


@pytest.fixture(scope="module")
def grid(skews: FigureData) -> FigureData:
    """The run without skew as if it were the points of a grid; HarMoEny is the slower, the more tokens there are."""
    first = skews.summary[skews.summary["router.skew"] == 0].drop(columns="router.skew")
    points = [
        {"machine": machine, "model": model, "seq_len": seq_len, "router": router, "spare_slots": spare_slots}
        for machine in ("one", "two")
        for model in ("small", "large_layers")
        for seq_len in (64, 2048)
        for router in ("uniform", "moving")
        for spare_slots in (0, 2)
        if (router, spare_slots) != ("moving", 0)  # a part of it was not run
    ]
    slower = {64: 1.0, 2048: 4.0}
    frames = []
    for i, point in enumerate(points):
        ours = first["system"] == "harmoeny"
        factor = ours.map({True: 1 / slower[int(str(point["seq_len"]))], False: 1.0})
        slowed = {name: first[name] * factor for name in map(str, first.columns) if name.startswith("throughput_")}
        frames.append(first.assign(run_id=f"run {i}", **point, **slowed))
    return FigureData(pd.concat(frames, ignore_index=True), list(points[0]), skews.caption, skews.runs)


@pytest.fixture(scope="module")
def without_parts(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Two runs of HarMoEny and of variants that lack a part: one takes twice the time in every round, one as long."""
    folder = tmp_path_factory.mktemp("results")
    names = ["harmoeny", "static_ep", "harmoeny_without_settling", "harmoeny_without_overlap"]
    for i, size in enumerate((16, 1024)):
        whole = [1.0 + i, 2.0, 4.0]
        latency = dict(zip(names, (whole, [9.0] * 3, [2 * s for s in whole], whole), strict=True))
        write_run(folder / str(size), seed=i, latency_s=latency)
    return figure_data([load_run(folder / str(s)) for s in (16, 1024)], [{"seq_len": s} for s in (16, 1024)])


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """A run with an open loop at three rates, of which static EP keeps up with two; 40 requests each."""
    folder = tmp_path_factory.mktemp("results") / "run"
    write_run(folder)
    ttft_s = {("harmoeny", rate): [0.1 * rate] * 20 for rate in (2.0, 4.0, 8.0)}
    write_rates(folder, ttft_s | {("static_ep", rate): [0.2 * rate] * 20 for rate in (2.0, 4.0)})
    change_config(folder, slo={"ttft_s": 0.7, "tpot_s": 1.0, "e2e_s": None, "share": 0.9})
    return figure_data([load_run(folder)], [{}])


@pytest.fixture(scope="module")
def small_memory(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Runs of a published model with 8 and 4 slots and a decode phase, as the larger one was first."""
    folder = tmp_path_factory.mktemp("results")
    for slots in (8, 4):
        write_run(folder / str(slots), seed=slots, latency_s=OTHERS)
        write_serving(folder / str(slots), list(OTHERS), num_rounds=3)
        systems = json.loads((folder / str(slots) / "manifest.json").read_text())["systems"]
        memory = {name: kind | {"device_expert_bytes": slots * 2**30} for name, kind in systems.items()}
        change_manifest(folder / str(slots), systems=memory)
        change_config(folder / str(slots), num_slots=slots, model={"hub_name": "deepseek-ai/DeepSeek-V2-Lite"})
    return figure_data([load_run(folder / str(n)) for n in (8, 4)], [{"num_slots": n} for n in (8, 4)])


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """EPS-MoE with 1 and 2 stages and by its cost model, with 512 and 1,024 tokens per rank."""
    folder = tmp_path_factory.mktemp("results")
    names = {"static_ep": None, "static_ep_1": 1, "static_ep_2": 2}
    for tokens in (512, 1024):
        run = write_run(folder / str(tokens), latency_s=dict.fromkeys(names, [1.0] * 3))
        seconds = {"static_ep": 1.5, "static_ep_1": 3.0, "static_ep_2": 2.0}
        layers = pd.DataFrame(run.layers)
        layers["layer_s"] = layers["system"].map(seconds) * tokens / 512
        layers.loc[layers["rank"] == 1, "layer_s"] /= 2  # the slowest counts
        layers.to_parquet(folder / str(tokens) / "layers.parquet", index=False)
        change_config(folder / str(tokens), batch_size=2, seq_len=tokens // 2)
        systems = json.loads((folder / str(tokens) / "manifest.json").read_text())["systems"]
        for name, num_stages in names.items():
            systems[name] |= {"policy": "eps_moe", "options": {"num_stages": num_stages}}
        change_manifest(folder / str(tokens), systems=systems)
    return figure_data([load_run(folder / str(n)) for n in (512, 1024)], [{"seq_len": n // 2} for n in (512, 1024)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """HybriMoE, and variants with none of its parts and with scheduling alone, which differ in every phase."""
    folder = tmp_path_factory.mktemp("results") / "run"
    prefill = {"hybrimoe": 1.0, "hybrimoe_base": 3.0, "hybrimoe_scheduling": 2.0}
    write_run(folder, latency_s={name: [seconds] * 3 for name, seconds in prefill.items()})
    write_serving(folder, list(prefill), num_rounds=3)
    decode = pd.read_parquet(folder / "decode.parquet")
    token = decode["system"].map({"hybrimoe": 2.0, "hybrimoe_base": 2.0, "hybrimoe_scheduling": 1.0})
    decode.assign(tpot_s=token, decode_s=5 * token).to_parquet(folder / "decode.parquet", index=False)
    return figure_data([load_run(folder)], [{}])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Two caches of four experts of 352 MB, beside hosts that read one in 44.1 and in 7.3 ms."""
    folder = tmp_path_factory.mktemp("results")
    options = {"lru_2": {"num_slots": 2, "indexes": None}, "lru_4": {"num_slots": 4, "indexes": 1}}
    for milliseconds in (44.1, 7.3):
        own = folder / str(milliseconds)
        write_run(own, latency_s=dict.fromkeys(options, [1.0] * 3))
        write_serving(own, list(options), num_rounds=3)
        manifest = json.loads((own / "manifest.json").read_text())
        systems = {
            name: kind | {"policy": "cpu_gpu_lru", "options": options[name]}
            for name, kind in manifest["systems"].items()
        }
        change_manifest(own, systems=systems, model=manifest["model"] | {"expert_bytes": 352e6})
        change_config(own, hardware={"host_weights_bytes_per_s": 352e9 / milliseconds})
    return figure_data([load_run(folder / str(t)) for t in (44.1, 7.3)], [{}, {}])
