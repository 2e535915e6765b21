"""Files for serving engines, read back as the engines' own documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.routing.placements import ENGINES, write_placement
from harmoeny.placement import BoolArray
from scripts.placement import main
from tests.experiments.routing.formats import recorded as r

EXPERTS, RANKS, SLOTS = 6, 3, 3


@pytest.fixture
def layers() -> list[BoolArray]:
    """Two layers of 6 experts on 3 ranks with 3 slots each, so 3 of 9 slots are replicas."""
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        resident = np.zeros((EXPERTS, RANKS), dtype=np.bool_)
        resident[rng.permutation(EXPERTS), np.arange(EXPERTS) % RANKS] = True
        for rank in range(RANKS):
            resident[rng.choice(np.flatnonzero(~resident[:, rank])), rank] = True
        found.append(resident)
    return found


def residents(slots: list[int]) -> BoolArray:
    """Give every SLOTS slots in a row to the next rank."""
    resident = np.zeros((EXPERTS, RANKS), dtype=np.bool_)
    for slot, expert in enumerate(slots):
        resident[expert, slot // SLOTS] = True
    return resident


def test_sglang(layers: list[BoolArray], tmp_path: Path) -> None:
    """expert_location.py: [layers, physical experts], as many on every rank, every layer of the model has a row."""
    path = tmp_path / "placement.json"
    write_placement(layers, "sglang", path, first_layer=1)
    content = json.loads(path.read_text())
    assert list(content) == ["physical_to_logical_map"], "all of the file is given to init_by_mapping by name"
    rows = content["physical_to_logical_map"]
    assert [len(row) for row in rows] == [RANKS * SLOTS] * 3
    assert rows[0] == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    for row, resident in zip(rows[1:], layers, strict=True):
        assert set(row) == set(range(EXPERTS))
        np.testing.assert_array_equal(residents(row), resident)


def test_tensorrt_llm(layers: list[BoolArray], tmp_path: Path) -> None:
    """README of ep_load_balancer: layer: expert of every slot; successive slots are a rank's; 0 updates: static."""
    path = tmp_path / "moe_load_balancer.yaml"
    write_placement(layers, "tensorrt_llm", path, first_layer=3)
    content = yaml.safe_load(path.read_text())
    assert content["num_slots"] == RANKS * SLOTS
    assert content["layer_updates_per_iter"] == 0
    assert list(content["initial_global_assignments"]) == [3, 4]
    for row, resident in zip(content["initial_global_assignments"].values(), layers, strict=True):
        assert len(row) == content["num_slots"]
        np.testing.assert_array_equal(residents(row), resident)
    assert len(path.read_text().splitlines()) == 5, "a line per layer, as the example has it"


def test_vllm_ascend(layers: list[BoolArray], tmp_path: Path) -> None:
    """MindSpeed-RL, docs/features/EPLB.md: every device has as many experts, none of them twice."""
    path = tmp_path / "expert_map.json"
    write_placement(layers, "vllm_ascend", path)
    content = json.loads(path.read_text())
    assert content["moe_layer_count"] == len(content["layer_list"]) == 2
    for number, (entry, resident) in enumerate(zip(content["layer_list"], layers, strict=True)):
        assert (entry["layer_id"], entry["device_count"]) == (number, RANKS)
        for rank, device in enumerate(entry["device_list"]):
            assert device["device_id"] == rank
            assert len(set(device["device_expert"])) == len(device["device_expert"]) == SLOTS
            assert set(device["device_expert"]) == set(np.flatnonzero(resident[:, rank]).tolist())


def test_what_no_engine_can_take_is_refused(layers: list[BoolArray], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(ValueError, match=r"--out: '.*p\.json', must end in \.yaml for tensorrt_llm"):
        write_placement(layers, "tensorrt_llm", path)
    with pytest.raises(ValueError, match="--first-layer: -1, must be at least 0"):
        write_placement(layers, "sglang", path, first_layer=-1)
    lost = layers[0].copy()
    lost[4] = False
    uneven = layers[0] | np.eye(EXPERTS, RANKS, dtype=np.bool_)
    for wrong, message in ((lost, "expert 4 is on no rank"), (uneven, "ranks hold 3 to 4 experts")):
        with pytest.raises(ValueError, match=message):
            write_placement([wrong], "sglang", path)


@pytest.mark.parametrize("engine", ENGINES)
def test_recorded_routing_becomes_a_placement(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in r.megatron(tmp_path, r.choices())]
    out = tmp_path / f"placement{ENGINES[engine].suffix}"
    words = [*files, "--ranks", "3", "--spare-slots", "1", "--to", engine, "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "slots:      9 for 6 experts, 3 per rank" in said
    assert f"{engine}: " in said
    assert str(out) in said.splitlines()[-2], "the option that takes the file"
    assert ("--ep-num-redundant-experts 3" in said) == (engine == "sglang")
    assert "on batches that it has not seen" in said
    assert out.is_file()
    assert main([*words, "--system", "static_ep"]) == 2
    assert "error: --system: 'static_ep', must be one of eplb, " in capsys.readouterr().err
    assert main([*files, "--ranks", "0", "--to", engine, "--out", str(out)]) == 2
    assert "error: --ranks: 0, must be at least 1" in capsys.readouterr().err
