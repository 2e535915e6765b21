"""Starting and joining ranks, other than through run.py (which test_smoke does)."""

from __future__ import annotations

import json
import signal

import pandas as pd
import pytest

from experiments.launch.environment import is_main_rank, joined_world_size
from experiments.launch.host import host_config
from experiments.launch.local import launch
from experiments.text.tokens import prepare_tokens
from tests.conftest import Load
from tests.experiments.runs import begin


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks(world_size: int, load: Load) -> None:
    point = load(
        "experiment=smoke", "rounds=1", f"world_size={world_size}", "system=[harmoeny,static_ep]", "router.skew=0.9"
    )
    tokens = prepare_tokens(point.dataset, point.model.vocab_size, point.model.tokenizer)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    launch(begin(point), tokens)

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    manifest = json.loads((point.folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", world_size)
    assert all(check["passed"] for check in manifest["checks"].values())
    layers = pd.read_parquet(point.folder / "layers.parquet")
    assert sorted(layers["rank"].unique()) == list(range(world_size))
    executed = layers.groupby(["system", "layer"])["executed_tokens"].sum()
    sent = layers.groupby(["system", "layer"])["sent_tokens"].sum()
    for system in ("harmoeny", "static_ep"):
        # Two sequences of 32 tokens per rank through the encoder, one token of each through the decoder.
        assert executed[system].tolist() == [64 * world_size, 64 * world_size, 2 * world_size]
    assert (sent == 0).all() if world_size == 1 else (sent["static_ep"] > 0).all()
    quiet_ranks = {int(path.parent.name) for path in (point.folder / "logs").rglob("stderr.log")}
    assert quiet_ranks == set(range(1, world_size)), "rank 0 alone speaks to the terminal"


def test_ranks_with_gpus_are_not_forked() -> None:
    assert host_config(2, "cuda", "x", preload="none").start_method == "spawn"


@pytest.mark.parametrize(
    ("environment", "world_size", "main"),
    [
        ({}, None, True),
        ({"WORLD_SIZE": "4"}, None, True),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 4, True),
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 4, False),
    ],
    ids=["alone", "a variable that says little", "torchrun's rank 0", "torchrun's rank 3"],
)
def test_ranks_are_joined_where_torchrun_started_them(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world_size: int | None, main: bool
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert joined_world_size() == world_size
    assert is_main_rank() == main
