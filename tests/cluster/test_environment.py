"""Ranks from what SLURM says about a step, against the variables that a real one had (22.05; see also test_slurm)."""

from __future__ import annotations

import os

import pytest

from experiments.launch.environment import (
    adopt_slurm_step,
    choose_gloo_interface,
    first_host,
    is_main_rank,
    joined_world_size,
    num_threads,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: The fourth of five ranks on two nodes, three on the first and two on the second.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, "GLOO_SOCKET_IFNAME", *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what the code under test sets is undone, too
        monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_several_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **STEP)
    adopt_slurm_step()
    ranks = [os.environ[name] for name in TORCHRUN[:5]]
    assert ranks == ["3", "5", "0", "2", "gpu07"]
    assert joined_world_size() == 5
    assert not is_main_rank()
    port = os.environ["MASTER_PORT"]
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    _set(monkeypatch, **(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}))
    adopt_slurm_step()
    assert os.environ["MASTER_PORT"] == port, "all ranks meet at one port"
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "5", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["no SLURM", "a batch script itself", "a single task"],
)
def test_nothing_else_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    _set(monkeypatch, **variables)
    adopt_slurm_step()
    assert joined_world_size() is None


def test_torchrun_inside_a_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **STEP, RANK="7", WORLD_SIZE="8", MASTER_ADDR="gpu07", MASTER_PORT="1234")
    adopt_slurm_step()
    assert (os.environ["RANK"], joined_world_size()) == ("7", 8)


def test_a_place_to_meet_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **STEP, MASTER_ADDR="10.0.0.7", MASTER_PORT="1234")
    adopt_slurm_step()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,login1", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[12,07]-ib,login[1-2]", "gpu12-ib"),
        ("rack3-node[001-128]", "rack3-node001"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("r[1-2]c[0-3]-ib", "r1c0-ib"),
    ],
)
def test_first_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SLURM_STEP_NODELIST=nodes)
    assert first_host() == first


def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [num_threads(n) for n in (1, 3, 5, 24)] == [12, 4, 2, 1]
    _set(monkeypatch, **STEP, SLURM_CPUS_PER_TASK="6", WORLD_SIZE="5")
    assert num_threads(3) == 6, "SLURM gave so many to each task"
    _set(monkeypatch, WORLD_SIZE="40")
    assert num_threads(3) == 4, "every task is a torchrun that starts several ranks"


def test_gloo_takes_the_interface_towards_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE="2", WORLD_SIZE="2")
    choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    _set(monkeypatch, GLOO_SOCKET_IFNAME="ib0")
    choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
