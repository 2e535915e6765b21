from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.hardware import Hardware
from scripts.calibrate import fit, spreads, write
from scripts.machine import NUM_EXPERTS, Expert, measure
from tests.programs import Programs


@given(st.floats(1e-6, 1e-2), st.floats(1e3, 1e12), st.floats(0.99, 1.01))
def test_a_fit_finds_the_terms_that_made_the_samples(fixed: float, rate: float, noise: float) -> None:
    # Sizes around the one where both terms weigh the same, so that both can be told.
    sizes = [fixed * rate * times for times in (0.1, 1.0, 10.0)]
    samples = [(size, (fixed + size / rate) * n) for size, n in zip(sizes, (1, noise, 1), strict=True)]
    found_fixed, found_rate = fit(samples)
    assert found_fixed == pytest.approx(fixed, rel=0.05)
    assert found_rate == pytest.approx(rate, rel=0.05)


def test_a_negative_fixed_time_is_refused_for_zero() -> None:
    assert fit([(1.0, 0.5), (2.0, 2.0), (3.0, 3.5)])[0] == 0.0


def test_times_that_do_not_grow_have_no_rate() -> None:
    with pytest.raises(ValueError, match="do not grow"):
        fit([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)])


def test_the_threshold_is_the_smallest_that_hides_a_fetch() -> None:
    hardware = Hardware(host_link_bytes_per_s=8e9, host_link_latency_s=1e-5, expert_flops_per_s=10e12)
    expert_bytes, flops_per_token = 2 * 768 * 3072 * 4, 2 * 2 * 768 * 3072
    cost = hardware.expert_cost(expert_bytes=expert_bytes, flops_per_token=flops_per_token)
    assert cost is not None
    threshold = cost.threshold_tokens()
    fetch_s = 1e-5 + expert_bytes / 8e9
    assert (threshold - 1) * flops_per_token / 10e12 < fetch_s <= threshold * flops_per_token / 10e12
    # The authors chose 1,024 to 1,512 tokens on a V100 with a link like this one; at 10 TFLOP/s it is 2,511.
    assert 1_000 < threshold < 4_000


def test_weights_from_peers_cross_the_network_where_ranks_are_on_several_nodes() -> None:
    hardware = Hardware(
        host_link_bytes_per_s=1.0, expert_flops_per_s=1.0, all_to_all_bytes_per_s=20.0, all_to_all_latency_s=1.0,
        ranks_per_node=8, network_bytes_per_s=5.0, network_latency_s=2.0,
    )  # fmt: skip
    inside, across = (
        hardware.expert_cost(expert_bytes=100, flops_per_token=1, token_bytes=10, world_size=n) for n in (8, 9)
    )
    assert inside is not None
    assert across is not None
    assert (inside.peer_fetch_s, inside.exchange_token_s) == (1 + 100 / 20, 10 / 20)
    assert (across.peer_fetch_s, across.exchange_token_s) == (3 + 100 / 5, 10 / 5)


def test_an_uncalibrated_machine_has_no_costs() -> None:
    assert Hardware().expert_cost(expert_bytes=1, flops_per_token=1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_link": "wires"}, "hardware.host_link: 'wires', must be one of memcpy, emulated"),
        ({"host_link": "emulated"}, "hardware.host_link_bytes_per_s: null, must be set"),
        ({"expert_flops_per_s": 0.0}, "hardware.expert_flops_per_s: 0.0, must be a number above 0"),
        ({"host_link_latency_s": -1.0}, "hardware.host_link_latency_s: -1.0, must be a number of at least 0"),
    ],
)
def test_impossible_hardware_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Hardware(**changes).validate()  # type: ignore[arg-type]


def test_what_is_written_is_a_choice_of_the_hardware_group(tmp_path: Path) -> None:
    hardware = Hardware(name="here", host_link_bytes_per_s=9e9, expert_flops_per_s=3e10, expert_launch_s=1e-5)
    write(hardware, tmp_path / "here.yaml", "measured\non a machine")
    text = (tmp_path / "here.yaml").read_text()
    assert text.startswith("# measured\n# on a machine\n")
    content = yaml.safe_load(text)
    assert content.pop("defaults") == ["measured"]
    assert Hardware(**content) == hardware


@given(st.floats(0.01, 0.3), st.floats(0.0, 0.3), st.integers(0, 2**31))
def test_spreads_of_rounds_and_ranks_are_told_apart(rank_spread: float, round_spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rounds = round_spread * rng.standard_normal(60)
    logs = rounds[None, :, None] + rank_spread * rng.standard_normal((2, 60, 40))
    found_round, found_rank = spreads(1e-3 * np.exp(logs))
    assert found_rank == pytest.approx(rank_spread, rel=0.1)
    assert found_round == pytest.approx(float(rounds.std(ddof=1)), abs=0.2 * rank_spread)


def test_a_grouped_kernel_is_measured_by_waves() -> None:
    with torch.inference_mode():
        found = measure(torch.device("cpu"), Expert(16, 32, "float32"), 1, "grouped_mm")
    assert found.kernel == "grouped_mm"
    assert all(size % NUM_EXPERTS == 0 for size, _ in found.samples["expert"])
    assert min(found.busy_s[0]) > 0


@pytest.mark.ranks
def test_calibration_measures_writes_and_refuses_to_overwrite(programs: Programs, tmp_path: Path) -> None:
    command = [
        "-m", "scripts.calibrate", "--name", "tiny", "--hidden-size", "256", "--intermediate-size",
        "1024", "--rounds", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    done = programs.run(*command)
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    for rate in ("host_link_bytes_per_s", "expert_flops_per_s", "all_to_all_bytes_per_s"):
        assert content[rate] > 1e6
    assert 0 < content["rank_spread"] < 5
    assert "HarMoEny's threshold for this expert is" in done.stdout
    again = programs.run(*command, timeout_s=60)
    assert again.returncode == 2
    assert "exists already" in again.stderr
