"""What only one host of a job lacks ends the ranks of the others too, within seconds, with the first cause."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.experiments.command import Command
from tests.programs import Programs

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120), pytest.mark.usefixtures("text_prepared")]

#: Longer than the test may take.
TIMEOUT_S = 300


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _start(programs: Programs, folder: Path, rank: int, port: str, variables: dict[str, str]) -> Command:
    """Start a rank that is the first of its host."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return Command(
        folder,
        *("run.py", "experiment=smoke", "system=[static_ep]", "router.skew=0.9", f"timeout_s={TIMEOUT_S}"),
        *("wandb.mode=disabled", f"results_dir={folder / 'results'}"),
        variables=place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables,
        programs=programs,
    )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_cache_that_cannot_be_used_on_one_host(failing: int, programs: Programs, tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    port = _free_port()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                _start(programs, tmp_path, rank, port, {"HARMOENY_CACHE": str(no_folder)} if rank == failing else {})
            )
            for rank in range(2)
        ]
        ranks[failing].wait_until(lambda: "error:" in ranks[failing].output(), 60)
        known = time.monotonic()
        for command in ranks:
            assert command.wait(60) in (1, 2), command.output()
            assert command.remaining() == set()
        assert time.monotonic() - known < 20, "no more than the start of the other one takes"
        (cause,) = ranks[failing].errors()
        assert "HARMOENY_CACHE" in cause
        (heard,) = ranks[1 - failing].errors()
        assert f"rank {failing} on {socket.gethostname()}: HARMOENY_CACHE" in heard
    for path in tmp_path.glob("results/smoke/*/manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest["status"] == "failed"
        assert "HARMOENY_CACHE" in manifest["error"]
