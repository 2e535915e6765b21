"""Decode and open loop of a simulation, on hardware that takes one second per MoE layer and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.compose.compose import compose_point
from experiments.simulator.backend import simulate
from results_schema.tables import DECODE, LAYERS, REQUESTS

#: Nothing takes time but the runtime itself.
SECOND_PER_LAYER = (
    "backend=simulator", "world_size=2", "warmup_rounds=0", "hardware=emulated_pcie3",
    "hardware.expert_flops_per_s=1e30", "hardware.all_to_all_bytes_per_s=1e30", "hardware.runtime_layer_s=1",
    "simulator=runtime", "+simulator.software.static_ep.plan_s=0",    "system=[static_ep]",
)  # fmt: skip


def tables(*overrides: str) -> dict[str, pd.DataFrame]:
    point = compose_point("experiment=smoke", *SECOND_PER_LAYER, *overrides)
    return {table.name: frame for table, frame in simulate(point).tables(point).items()}


def test_requests_wait_for_the_batch_before_them(tmp_path: Path) -> None:
    arrivals = tmp_path / "arrivals.txt"
    arrivals.write_text("\n".join(map(str, (0, 0.5, 0.6, 0.7, 0.8, 100))))
    found = tables("rounds=1", "batch_size=2", "model=moe_stack", "model.num_layers=3", f"requests.arrivals={arrivals}")
    served = found[REQUESTS.name].query("loop == 'open'")
    # The first alone; then four at most, two per rank; the last long after them.
    assert served["batch"].tolist() == [0, 1, 1, 1, 1, 2]
    assert served["rank"].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(served["start_s"], [0, 3, 3, 3, 3, 100])
    np.testing.assert_allclose(served["first_token_s"], [3, 6, 6, 6, 6, 103], rtol=1e-6)
    np.testing.assert_allclose(served["queue_s"], [0, 2.5, 2.4, 2.3, 2.2, 0])
    closed = found[REQUESTS.name].query("loop == 'closed'")
    assert len(closed) == 4
    np.testing.assert_allclose(closed["ttft_s"], 3, rtol=1e-6)


def test_a_decode_step_takes_what_its_layers_take() -> None:
    found = tables("rounds=2", "model=qwen3_tiny", "batch_size=2", "decode_tokens=5")
    num_layers = found[LAYERS.name]["layer"].nunique()
    decode = found[DECODE.name]
    assert decode["output_tokens"].tolist() == [2 * 2 * 5] * 2
    np.testing.assert_allclose(decode["decode_s"], 5 * num_layers, rtol=1e-4)
    np.testing.assert_allclose(decode["tpot_s"], num_layers, rtol=1e-4)


def test_every_step_is_routed_anew() -> None:
    # Two experts on two ranks and one token each: steps whose tokens meet on one rank take twice as long.
    slow = ("hardware.expert_flops_per_s=1e4", "hardware.runtime_layer_s=0")
    decode = tables(
        "rounds=8", "model=qwen3_tiny", "batch_size=1", "decode_tokens=4", "router=uniform", *slow
    )[DECODE.name]  # fmt: skip
    assert decode["decode_s"].nunique() > 1


def test_what_a_model_would_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_tokens: 2, must be 0 with backend=simulator and router=model"):
        compose_point("experiment=smoke", *SECOND_PER_LAYER, "model=qwen3_tiny", "router=model", "decode_tokens=2")


def test_open_loop_and_decode_are_the_same_twice() -> None:
    options = (
        "rounds=2", "model=qwen3_tiny", "requests.arrivals=poisson", "requests.rate_per_s=0.5", "decode_tokens=3",
        "hardware.rank_spread=0.2", "hardware.round_spread=0.2",
    )  # fmt: skip
    first, second = tables(*options), tables(*options)
    for name in (REQUESTS.name, DECODE.name, LAYERS.name):
        pd.testing.assert_frame_equal(first[name], second[name])
