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


def test_further_tokens_wait_for_prompts_and_are_computed_together(tmp_path: Path) -> None:
    # Two layers: every pass takes 2 s. Prompts at 0 and, when that is read, at 2; then both get two more tokens each.
    arrivals = tmp_path / "arrivals.txt"
    arrivals.write_text("0\n0.5\n1\n100\n")
    options = ("rounds=1", "batch_size=1", "model=qwen3_tiny", f"requests.arrivals={arrivals}")
    served = tables(*options, "requests.output_tokens=3")[REQUESTS.name].query("loop == 'open'")
    assert served["batch"].tolist() == [0, 1, 4, 7]
    np.testing.assert_allclose(served["start_s"], [0, 2, 8, 100], rtol=1e-4)  # the third: its rank has room for one
    np.testing.assert_allclose(served["first_token_s"], [2, 4, 10, 102], rtol=1e-4)
    np.testing.assert_allclose(np.stack(list(served["itl_s"])), [[4, 2], [2, 2], [2, 2], [2, 2]], rtol=1e-4)
    np.testing.assert_allclose(served["tpot_s"], [3, 2, 2, 2], rtol=1e-4)
    np.testing.assert_allclose(served["decode_s"], [6, 4, 4, 4], rtol=1e-4)
    assert served["output_tokens"].tolist() == [3] * 4
    single = tables(*options)[REQUESTS.name].query("loop == 'open'")
    np.testing.assert_allclose(single["first_token_s"], [2, 4, 4, 102], rtol=1e-4)
    assert single["tpot_s"].tolist() == [0.0] * 4
    assert [len(gaps) for gaps in single["itl_s"]] == [0] * 4


def test_a_server_of_one_request_at_a_time_has_lindleys_waiting_times() -> None:
    # One rank, one layer: 1 s per request at 0.8 requests per second. Lindley (1952): a request waits as long as the
    # one before it waited and was served, less the gap between the two.
    options = (
        "model=moe_stack", "model.num_layers=1", "batch_size=1", "rounds=1", "world_size=1", "seq_len=8",
        "requests.arrivals=gamma", "requests.cv=1.5", "requests.rate_per_s=0.8", "requests.per_round=400",
    )  # fmt: skip
    served = tables(*options)[REQUESTS.name].query("loop == 'open'")
    waits = [0.0]
    for gap in np.diff(served["arrival_s"]):
        waits.append(max(0.0, waits[-1] + 1 - gap))
    assert max(waits) > 3
    np.testing.assert_allclose(served["queue_s"], waits, atol=1e-4)


def test_rates_grow_until_too_few_keep_the_limits() -> None:
    # Drop's requests take 1 s, those of static EP 2 s: it falls behind at half the rate.
    options = (
        "model=moe_stack", "model.num_layers=1", "batch_size=1", "rounds=2", "world_size=1", "seq_len=8",
        "requests.arrivals=poisson", "requests.rate_per_s=0.1", "requests.per_round=60", "requests.rate_step=2",
        "slo.ttft_s=3", "system=[static_ep,drop]", "+simulator.software.static_ep.layer_s=1",
        "+simulator.software.drop.plan_s=0",
    )  # fmt: skip
    served = tables(*options, "requests.max_rates=6")[REQUESTS.name].query("loop == 'open'")
    assert served.groupby(["system", "rate_per_s"]).size().eq(120).all()
    good = served.assign(good=served["ttft_s"] <= 3).groupby(["system", "rate_per_s"])["good"].mean()
    for system in ("static_ep", "drop"):
        shares = good[system]
        assert (shares.iloc[:-1] >= 0.9).all()
        assert list(shares.index) == pytest.approx([0.1 * 2**k for k in range(len(shares))])
    assert good["static_ep"].iloc[-1] < 0.9
    assert len(good["static_ep"]) < len(good["drop"])
    capped = tables(*options, "requests.max_rates=2")[REQUESTS.name].query("loop == 'open'")
    assert sorted(capped["rate_per_s"].unique()) == [0.1, 0.2]


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
