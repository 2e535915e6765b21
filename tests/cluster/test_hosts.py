"""Ranks on two hosts under torchrun, before and after the network between them fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest

from experiments.results.run_folder import RunFolder
from tests.cluster.hosts import ADDRESSES, NoHostsError, TwoHosts, two_hosts
from tests.experiments.command import Command

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(240), pytest.mark.usefixtures("text_prepared")]

TIMEOUT_S = 20
#: Of the second point: more than will ever be run.
MANY_ROUNDS = 500


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts())
        except NoHostsError as reason:
            pytest.skip(str(reason))
        yield made


def _start(hosts: TwoHosts, folder: Path, host: int) -> Command:
    return Command(
        folder,
        *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1"),
        *("--master-addr", ADDRESSES[0], "--master-port", "29500"),
        *("run.py", "experiment=smoke", "system=[harmoeny,static_ep]", "router.skew=0.9", f"rounds=2,{MANY_ROUNDS}"),
        *(f"timeout_s={TIMEOUT_S}", "wandb.mode=disabled", f"results_dir={folder / 'results'}"),
        prefix=hosts.on(host),
    )


def test_both_hosts_end_when_the_network_between_them_fails(hosts: TwoHosts, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(_start(hosts, tmp_path, host)) for host in range(2))
        first.wait_until(lambda: "(2 of 2): round 2" in first.output(), 150)
        hosts.cut()
        for rank, command in enumerate((first, second)):
            assert command.wait(TIMEOUT_S + 30) == 1, command.output()
            assert command.remaining() == set()
            (error,) = (line for line in command.output().splitlines() if line.startswith("error:"))
            assert f"rank {rank} on harmoeny-" in error
            assert f"lost another rank, which failed or cannot be reached (timeout_s is {TIMEOUT_S})" in error

    done, lost = sorted(
        tmp_path.glob("results/smoke/*/manifest.json"), key=lambda path: not RunFolder(path.parent).is_finished
    )
    assert RunFolder(done.parent).is_finished
    layers = pd.read_parquet(done.parent / "layers.parquet")
    sent = layers[layers["system"] == "static_ep"].groupby("rank")["sent_tokens"].sum()
    assert (sent > 0).all(), "each host had tokens for the other"
    manifest = json.loads(lost.read_text())
    assert manifest["status"] == "failed"
    assert "rank 0 on harmoeny-" in manifest["error"]
    assert not (lost.parent / "layers.parquet").exists()
