import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.data.load import Run, load_run
from analysis.data.metrics import per_iteration
from analysis.data.summary import write_summary
from analysis.wandb.log import log_run
from analysis.wandb.upload import upload
from tests.analysis.wandb.server import serving
from tests.synthetic import write_run

pytestmark = pytest.mark.programs  # one of W&B


@pytest.fixture
def runs(no_account: None, tmp_path: Path) -> list[Run]:
    runs = [load_run(write_run(tmp_path / name, seed=seed).folder) for seed, name in enumerate(["first", "second"])]
    for run in runs:
        log_run(run, write_summary(run), [], group="g")
    return runs


@pytest.fixture
def key(no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


@pytest.fixture
def silent_server(no_account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes every connection, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("key")
def test_everything_recorded_arrives_and_only_once(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [run.folder for run in runs]
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert upload(folders[:1])
        named = {(v["displayName"], v["groupName"]) for v in server.operations["UpsertBucket"] if v["displayName"]}
        assert named == {("first", "g")}
        rounds = [line for line in server.lines["wandb-history.jsonl"] if "round" in line]
        values = per_iteration(runs[0].layers, runs[0].iterations)
        assert len(rounds) == 5
        for row in values.to_dict("records"):
            assert rounds[row["round"]][f"{row['system']}/ttft_s"] == pytest.approx(row["ttft_s"])
        artifacts = {v["input"]["artifactCollectionName"] for v in server.operations["CreateArtifact"]}
        assert "first" in artifacts
        assert upload(folders), "the first is not sent again"
        starts = [v["displayName"] for v in server.operations["UpsertBucket"] if v["displayName"]]
        assert starts == ["first", "second"]
    assert upload(folders), "nothing left to ask a server that is gone"


def test_missing_key_is_a_warning_at_once(runs: list[Run]) -> None:
    with pytest.warns(UserWarning, match=r"^W&B: 2 of 2 runs were not uploaded \(.*No API key.*\)"):
        assert not upload([run.folder for run in runs], patience_s=60)


@pytest.mark.usefixtures("key", "silent_server")
def test_missing_network_costs_a_bounded_time_once_and_nothing_is_lost(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=r"^W&B: 2 of 2 runs were not uploaded \(nothing happened for 3 s\)"):
        assert not upload([run.folder for run in runs], patience_s=3)
    assert _left_behind() == []
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert upload([run.folder for run in runs])
    assert len([line for line in server.lines["wandb-history.jsonl"] if "round" in line]) == 2 * 5


def _left_behind() -> list[str]:
    """Return W&B's processes that this test started and that live on."""
    deadline = time.monotonic() + 10
    while True:
        left = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"NETRC={os.environ['NETRC']}\0".encode() in (entry / "environ").read_bytes():
                    left.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        left = [command for command in left if "wandb sync" in command]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
