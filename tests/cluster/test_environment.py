"""Ranks from what SLURM says about a step, against the variables that a real one had (22.05; see also test_slurm)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from experiments.launch.environment import (
    adopt_slurm_step,
    check_gloo_interface,
    check_library_variables,
    check_rank_variables,
    choose_gloo_interface,
    first_host,
    is_main_rank,
    joined_world_size,
    num_threads,
)
from tests.experiments.command import Command

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


@pytest.mark.parametrize("name", [name for name in STEP if name not in ("SLURM_STEP_NUM_TASKS",)])
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_step_without_a_variable_is_refused_by_its_name(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, **(STEP | {name: value or ""}))
    if value is None:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"\A{name}: not set, must be as srun sets it for each of .*=5 tasks"):
        adopt_slurm_step()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "many", "'many', must be a number, at least 1"),
        ("SLURM_STEP_NUM_TASKS", "-4", "'-4', must be a number, at least 1"),
        ("SLURM_PROCID", "x", "'x', must be a number, at least 0"),
        ("SLURM_NODEID", "2", "2, must be below 2, the nodes in SLURM_STEP_TASKS_PER_NODE=3,2"),
        ("SLURM_STEP_NODELIST", "gpu[07-", "'gpu[07-', must be a list of nodes"),
        ("SLURM_STEP_NODELIST", ",", "',', must be a list of nodes"),
        ("SLURM_STEP_NODELIST", " ", "' ', must be a list of nodes"),
        ("SLURM_STEP_NODELIST", "(null)", "'(null)', must be a list of nodes"),
        ("SLURM_STEP_NODELIST", "a]b", "'a]b', must be a list of nodes"),
    ],
)
def test_a_step_with_a_wrong_variable_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, **(STEP | {name: value}))
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        adopt_slurm_step()


RANKS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("variables", [{}, RANKS, RANKS | LOCAL, RANKS | {"MASTER_ADDR": "localhost"}])
def test_ranks_with_all_that_they_need_are_accepted(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **variables)
    check_rank_variables()
    assert joined_world_size() == (2 if variables else None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "2", "'2', must be a number, 0 to 1 (WORLD_SIZE - 1)"),
        ("RANK", "-1", "'-1', must be a number, 0 to 1"),
        ("RANK", "one", "'one', must be a number"),
        ("WORLD_SIZE", "0", "'0', must be a number, at least 1"),
        ("WORLD_SIZE", "2.0", "'2.0', must be a number"),
        ("LOCAL_RANK", "2", "'2', must be a number, 0 to 1 (LOCAL_WORLD_SIZE - 1)"),
        ("LOCAL_RANK", "x", "'x', must be a number"),
        ("LOCAL_WORLD_SIZE", "3", "'3', must be a number, 1 to 2 (WORLD_SIZE)"),
        ("MASTER_PORT", "99999", "'99999', must be a number, 1 to 65535"),
        ("MASTER_PORT", "port", "'port', must be a number, 1 to 65535"),
        ("MASTER_PORT", "", "not set, must be a free port there where RANK and WORLD_SIZE are set"),
        ("MASTER_ADDR", "", "not set, must be the host of rank 0 where RANK and WORLD_SIZE are set"),
        ("MASTER_ADDR", "no.such.host.invalid", "'no.such.host.invalid', must be a host that this one can find"),
        ("SLURM_CPUS_PER_TASK", "x", "'x', must be a number, at least 1"),
    ],
)
def test_a_wrong_place_among_ranks_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, **(RANKS | LOCAL | {name: value}))
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        check_rank_variables()


@pytest.mark.parametrize("empty", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_empty_variable_is_as_if_it_were_not_set(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **(RANKS | LOCAL | {empty: ""}))
    check_rank_variables()
    assert empty not in os.environ
    assert joined_world_size() == (2 if empty.startswith("LOCAL") else None)


def test_an_interface_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, GLOO_SOCKET_IFNAME="lo")
    check_gloo_interface()
    _set(monkeypatch, GLOO_SOCKET_IFNAME="lo,nonsense0")
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME: 'nonsense0', must be one of .*\blo\b"):
        check_gloo_interface()


@pytest.mark.programs
@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (RANKS | {"RANK": "7"}, "RANK"),
        (RANKS | {"MASTER_PORT": "x"}, "MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID"),
        ({"GLOO_SOCKET_IFNAME": "no0"}, "GLOO_SOCKET_IFNAME"),
    ],
)
def test_run_says_so_in_one_line(variables: dict[str, str], name: str, tmp_path: Path) -> None:
    with Command(tmp_path, "run.py", f"results_dir={tmp_path / 'r'}", "dataset=random", variables=variables) as command:
        assert command.wait(60) == 2, command.output()
        assert len(command.output().splitlines()) == 1
        (error,) = command.errors()
        assert error.startswith(f"error: {name}: ")
    assert not (tmp_path / "r" / "single").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OMP_NUM_THREADS", "x", "OMP_NUM_THREADS: 'x', must be a number of threads, at least 1"),
        ("OMP_NUM_THREADS", "0", "OMP_NUM_THREADS: '0', must be a number of threads, at least 1"),
        ("MKL_NUM_THREADS", "-1", "MKL_NUM_THREADS: '-1', must be a number of threads"),
        ("NUMBA_NUM_THREADS", "2.5", "NUMBA_NUM_THREADS: '2.5', must be a number of threads"),
        ("COLUMNS", "0", "COLUMNS: '0', must be a number, at least 1"),
        ("CUDA_VISIBLE_DEVICES", "gpu0", "CUDA_VISIBLE_DEVICES: 'gpu0', must be devices' numbers or UUIDs"),
        ("CUDA_VISIBLE_DEVICES", "0,", "CUDA_VISIBLE_DEVICES: '0,', must be devices' numbers or UUIDs"),
    ],
)
def test_variables_that_libraries_read_are_refused_in_one_line(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        check_library_variables()


def test_variables_that_libraries_read_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"OMP_NUM_THREADS": "4,2", "MKL_NUM_THREADS": "", "COLUMNS": "", "MPLBACKEND": "nonsense"}
    for devices in ("", "-1", "0,1", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937/1/0", "NoDevFiles"):
        _set(monkeypatch, **good, CUDA_VISIBLE_DEVICES=devices)
        check_library_variables()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == devices, "empty: no device"
        assert os.environ["OMP_NUM_THREADS"] == "4,2"
        assert os.environ["MPLBACKEND"] == "agg", "nobody has to look at figures that are written"
        assert not {"MKL_NUM_THREADS", "COLUMNS"} & set(os.environ)


def test_a_number_of_ranks_alone_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE: 'x', must be a number, at least 1"):
        check_rank_variables()
