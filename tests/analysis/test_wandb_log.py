import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from analysis.load import Run, load_run
from analysis.metrics import METRICS, per_iteration
from analysis.summary import write_summary
from analysis.wandb_log import log_run
from tests.synthetic import write_run

Record: Any = vars(wandb_internal_pb2)["Record"]  # made by protobuf at import
_BLOCK = 32768
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Read a .wandb file: 7 bytes of header, then records in LevelDB's log format (blocks of 32 KiB)."""
    data, position, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if _BLOCK - position % _BLOCK < 7:  # too short for a header: padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(record)
            record = b""


def read_back(run: Run) -> dict[str, list[Any]]:
    """Return the records of the one W&B run in a run's folder, by kind."""
    wandb.teardown()  # the service writes the rest
    (path,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[Any]] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(write_run(tmp_path / "results" / "myrun").folder)


def test_offline_run_holds_the_numbers_of_the_summary(run: Run) -> None:
    summary = write_summary(run)
    assert log_run(run, summary, mode="offline", group="mysweep")
    logged = read_back(run)

    (described,) = logged["run"]
    assert (described.project, described.run_group, described.display_name, described.job_type) == (
        "tests", "mysweep", "myrun", "skew_sweep",
    )  # fmt: skip
    config = items(described.config.update)
    assert config["router"] == run.config["router"]
    assert config["manifest"] == run.manifest

    final = {name: value for record in logged["summary"] for name, value in items(record.update).items()}
    for system, entry in json.loads((run.folder / "summary.json").read_text())["systems"].items():
        for name, value in entry.items():
            for part, number in value.items() if isinstance(value, dict) else [(None, value)]:
                assert final[f"{system}/{name}" + (f"/{part}" if part else "")] == number
    assert final["best_baseline"] == "static_ep"

    history = [items(record.item) for record in logged["history"]]
    rounds = {row["round"]: row for row in history if "round" in row}
    values = per_iteration(run.layers, run.iterations)
    assert len(rounds) == 5
    assert len(values) == 25
    for row in values.to_dict("records"):
        for metric in METRICS:
            assert rounds[row["round"]][f"{row['system']}/{metric.name}"] == pytest.approx(row[metric.name])

    (table,) = (run.folder / "wandb").glob("offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(run.iterations.columns)
    assert content["data"] == run.iterations.to_numpy().tolist()


def test_a_run_is_logged_once(run: Run) -> None:
    summary = write_summary(run)
    assert log_run(run, summary, mode="offline", group="g")
    assert log_run(run, summary, mode="offline", group="g")
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 1


def test_online_without_a_key_is_offline_with_a_warning(run: Run) -> None:
    with pytest.warns(UserWarning, match=r"^W&B: mode is online, but there is no API key; logging offline$"):
        assert log_run(run, write_summary(run), mode="online", group="g")
    assert read_back(run)["history"]


def test_online_without_a_connection_is_offline_with_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route\nto host")
        return real(**options)

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match=r"^W&B: myrun was not logged online \(CommError: no route to host\)$"):
        assert log_run(run, write_summary(run), mode="online", group="g")
    assert read_back(run)["history"]


def test_disabled_writes_nothing(run: Run) -> None:
    before = sorted(run.folder.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not log_run(run, {}, mode="disabled", group="g")
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError, wandb.errors.UsageError])
def test_whatever_fails_is_a_warning_and_tried_again_next_time(
    error: type[Exception], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> Any:
        raise error("broken")

    monkeypatch.setattr(wandb, "init", init)
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"^W&B: myrun was not logged offline \({error.__name__}: .*broken.*\)$"):
            assert not log_run(run, write_summary(run), mode="offline", group="g")


def test_folder_that_cannot_be_written_is_a_warning(run: Run) -> None:
    summary = write_summary(run)
    (run.folder / "wandb").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match=r"^W&B: myrun was not logged offline \((File|NotADirectory)"):
        assert not log_run(run, summary, mode="offline", group="g")
