import dataclasses
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.checks import check_names
from experiments.compose.load import load_point
from experiments.compose.messages import explain
from experiments.launch.environment import is_main_rank, joined_world_size
from experiments.point.options import make_options
from tests.conftest import Compose, Load

# Overrides, and the one line that they must lead to.
BAD = {
    # Names that do not exist.
    "system=[nonsense]": r"system: 'nonsense', must be one of .*drop.*static_ep",
    "system=[harmoeny,nonsense]": r"system: 'nonsense', must be one of ",
    "model=nonsense": r"model: 'nonsense', must be one of .*moe_stack, .*switch_tiny",
    "dataset=nonsense": r"dataset: 'nonsense', must be one of .*arxiver, .*local, .*pydoc",
    "router=nonsense": r"router: 'nonsense', must be one of .*drift, .*skew, .*trace, .*zipf",
    "experiment=nonsense": r"experiment: 'nonsense', must be one of .*skew_sweep.*, smoke",
    "slo=nonsense": r"slo: 'nonsense', must be one of .*mlperf_mixtral_8x7b",
    "slo.ttft_s=0": r"slo\.ttft_s: 0\.0, must be a number above 0, or null",
    "slo.tpot_s=-1": r"slo\.tpot_s: -1\.0, must be a number above 0, or null",
    "slo.e2e_s=inf": r"slo\.e2e_s: inf, must be a number above 0, or null",
    "slo.share=1": r"slo\.share: 1\.0, must be above 0 and below 1",
    "hardware=nonsense": r"hardware: 'nonsense', must be one of .*measured",
    "nonsense=1": r"nonsense: no such field, must be one of experiment, tag, seed",
    "+nonsense=1": r"nonsense: no such field, must be one of experiment, tag, seed",
    "router.skw=1": r"router\.skw: no such field, must be one of skew, num_hot",
    "router=uniform router.skew=1": r"router\.skew: no such field, must be one of nothing: there are no options",
    "system=[harmoeny] systems.drop.capacity_factor=2": r"systems\.drop: no such field, must be one of harmoeny",
    "+router.nonsense=1": r"router: .*unexpected keyword argument 'nonsense'",
    "+systems.nonsense.threshold=1": r"systems\.nonsense: \{'threshold': 1\}, must be a Policy",
    "router._target_=no.such.Class": r"router: Error locating target 'no\.such\.Class'",
    "dataset._target_=experiments.routers.uniform.UniformRouter": r"dataset: \{.*UniformRouter'\}, must be a Dataset",
    # What cannot be read.
    "nonsense": r"'nonsense' cannot be read \(.*\), must be FIELD=VALUE or GROUP=CHOICE",
    "tag=é": r"'tag=é' cannot be read \(.*\), must be .*, letters beyond ASCII in quotes: 'FIELD=\"VALUE\"'$",
    "results_dir='\udcff'": r"results_dir: '\\udcff', must be text in UTF-8 \(PYTHONUTF8=1 reads it so\)",
    "seed=[1": r"'seed=\[1' cannot be read \(.*\), must be FIELD=VALUE",
    "router.skew=0,1": r"router\.skew=0,1: several values, must be one, or all of them .* with --multirun",
    # Wrong types and missing values.
    "seed=abc": r"seed: Value 'abc' of type 'str' could not be converted to Integer",
    "seed=1.5": r"seed: Value '1\.5' of type 'float' could not be converted to Integer",
    "seed=null": r"seed: field 'seed' is not Optional",
    "router.skew=abc": r"router\.skew: Value 'abc' of type 'str' could not be converted to Float",
    "systems.harmoeny.num_slots=1.5": r"systems\.harmoeny\.num_slots: Value '1\.5' .* to Integer",
    "wandb=1": r"wandb: Invalid type assigned: int",
    "seed=???": r"seed: missing, must be set",
    "wandb.mode=???": r"wandb\.mode: missing, must be set",
    "~seed": r"seed: missing, must be set",
    "~model": r"model: missing, must be set",
    "tag=${nonsense}": r"tag: Interpolation key 'nonsense' not found",
    # Values out of range.
    "world_size=0": r"world_size: 0, must be at least 1",
    "world_size=2147483648": r"world_size: 2147483648, must be at most 65536",
    "batch_size=0": r"batch_size: 0, must be at least 1",
    "seq_len=-1": r"seq_len: -1, must be at least 1",
    "rounds=0": r"rounds: 0, must be at least 1",
    "warmup_rounds=-1": r"warmup_rounds: -1, must be at least 0",
    "seed=-1": r"seed: -1, must be at least 0",
    f"tag={'x' * 240}": r"the run's folder: skew-.*x\.\.\. has \d+ bytes, must be at most 255: choose a shorter",
    f"tag='{'é' * 120}'": r"the run's folder: skew-.*\.\.\. has \d+ bytes, must be at most 255",
    f"results_dir={'x' * 256}": r"results_dir: 'x+' cannot be written \(File name too long\)",
    f"requests.arrivals={'x' * 256}": r"requests\.arrivals: 'x+' cannot be used \(File name too long\)",
    "hardware.link_factor=0.5": r"hardware\.link_factor: 0\.5, must be 1 with backend=ranks",
    f"router=trace router.path={'x' * 256}": r"router\.path: 'x+' cannot be used \(File name too long\)",
    f"trace.record={'x' * 256}.parquet": r"trace\.record: 'x+\.parquet' cannot be used \(File name too long\)",
    "timeout_s=0": r"timeout_s: 0, must be at least 1",
    "exchange=shm": r"exchange: 'shm', must be one of auto, collective, put",
    "backend=simulator hardware=cpu_core exchange=put": r"exchange: 'put', must be auto with backend=simulator",
    "device=tpu": r"device: 'tpu', must be one of auto, cpu, cuda",
    "wandb.mode=on": r"wandb\.mode: 'on', must be one of offline, online, disabled",
    "results_dir=": r"results_dir: '', must be a folder",
    "tag=a/b": r"tag: 'a/b', must hold only letters, digits",
    "router.skew=1.5": r"router\.skew: 1\.5, must be 0 to 1",
    "router.skew=nan": r"router\.skew: nan, must be 0 to 1",
    "router.num_hot=9": r"router\.num_hot: 9, must be 1 to model\.num_experts=8",
    "model.num_experts=0": r"model\.num_experts: 0, must be 1 to 65,536",
    "model.num_experts=2147483648": r"model\.num_experts: 2147483648, must be 1 to 65,536",
    "model=moe_stack model.top_k=9": r"model\.top_k: 9, must be 1 to model\.num_experts=8",
    "model=switch_tiny model.top_k=2": r"model\.top_k: 2, must be 1: Switch",
    "model=moe_stack model.top_k=2 router.skew=0.9": r"router\.skew: 0\.9, must be at most 0\.5: .*model\.top_k=2",
    "model.vocab_size=258": r"model\.vocab_size: 258, must be at least 259",
    "model.dtype=int8": r"model\.dtype: 'int8', must be one of float32, bfloat16",
    "hardware.host_link=x": r"hardware\.host_link: 'x', must be one of memcpy, emulated",
    "system=[]": r"system: \[\], must name at least one system",
    "systems.harmoeny.spare_slots=-1": r"systems\.harmoeny\.spare_slots: -1, must be at least 0",
    "systems.harmoeny.fetch=never": r"systems\.harmoeny\.fetch: 'never', must be one of none, sync, async, peer",
    "systems.harmoeny.num_slots=0": r"systems\.harmoeny\.num_slots: 0, must be at least 1, or null",
    "systems.harmoeny.num_slots=9": r"systems\.harmoeny\.num_slots: 9, must be at most 8 \(model\.num_experts\)",
    "num_slots=0": r"^num_slots: 0, must be at least 1, or null",
    "num_slots=1 spare_slots=1": r"^num_slots: 1, must be null with spare_slots=1",
    "systems.static_ep.placement=x": r"systems\.static_ep\.placement: 'x', must be one of contiguous, round_robin",
    "systems.drop.capacity_factor=0": r"systems\.drop\.capacity_factor: 0(\.0)?, must be a number above 0",
    # Files and folders.
    "dataset=local": r"dataset\.path: '', must be a file or a folder .*: dataset=local dataset\.path=FILE",
    "dataset=local dataset.path=/no/file": r"dataset\.path: '/no/file' does not exist, must be a file or a folder",
    "dataset=local dataset.path=/dev/null": r"dataset\.path: '/dev/null' is no file, must be a file or a folder",
    "results_dir=/dev/null/below": r"results_dir: '/dev/null/below' cannot be written \(Not a directory\), must be",
}  # fmt: skip


@pytest.mark.parametrize("overrides", BAD)
def test_bad_configuration_gives_one_line_with_field_value_and_what_is_allowed(overrides: str, load: Load) -> None:
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
        load(*overrides.split(" "))
    message = explain(caught.value)
    assert re.match(BAD[overrides], message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("num_gpus", "message"),
    [
        (0, r"device: 'cuda', must be cpu or auto: this PyTorch sees no CUDA device"),
        (1, r"world_size: 2, must be at most 1, the CUDA devices here"),
        (2, None),
    ],
)
def test_every_rank_needs_a_gpu_of_its_own(
    num_gpus: int, message: str | None, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    refused: AbstractContextManager[object] = nullcontext()
    if message is not None:
        refused = pytest.raises(ValueError, match=message)
    with refused:
        load("device=cuda", "world_size=2")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b"])
def test_name_of_an_experiment_must_be_good_for_a_folder(name: str, load: Load) -> None:
    with pytest.raises(ValueError, match=rf"^experiment: '{re.escape(name)}', must "):
        load_point(load().config | {"experiment": name})


def test_empty_text_file_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" \n")
    with pytest.raises(ValueError, match=r"^dataset\.path: '.*text' is empty, must hold text$"):
        load("dataset=local", f"dataset.path={tmp_path / 'text'}")


def test_defaults_are_valid(load: Load) -> None:
    point = load()
    assert list(point.systems) == ["harmoeny", "static_ep", "even_split", "drop"]
    assert point.options.world_size == 2


def test_options_reach_the_components(load: Load) -> None:
    point = load(
        "model=moe_stack", "model.top_k=2", "router=zipf", "router.exponent=0.5", "system=[drop,harmoeny]",
        "systems.drop.capacity_factor=1.25", "systems.harmoeny.window=7", "systems.harmoeny.fetch=sync",
    )  # fmt: skip
    assert point.model.top_k == 2
    assert vars(point.router) == {"exponent": 0.5}
    assert list(point.systems) == ["drop", "harmoeny"]
    assert vars(point.systems["drop"])["capacity_factor"] == 1.25
    assert vars(point.systems["harmoeny"]) | {"window": 7, "fetch": "sync"} == vars(point.systems["harmoeny"])


def test_values_are_enough_to_load_the_same_point_elsewhere(load: Load) -> None:
    point = load("router.skew=0.5", "systems.harmoeny.window=3")
    again = load_point(point.config)
    assert again == point
    assert again.run_id == point.run_id


def test_a_point_travels_as_it_is(load: Load) -> None:
    """Ranks get it pickled, policies of users' own files too, and neither build nor check anything again."""
    point = load(
        "router.skew=0.5", "requests.arrivals=poisson", "requests.rate_per_s=5",
        "+systems.faulty={_target_:tests.experiments.faulty.Faulty,switch:none}",
    )  # fmt: skip
    received = pickle.loads(pickle.dumps(point))
    assert received == point
    assert received.run_id == point.run_id
    assert type(received.systems["faulty"]).__module__ == "tests.experiments.faulty"
    assert received.options.requests.rate_per_s == 5.0


def test_an_experiment_with_a_name_that_no_folder_can_have(load: Load) -> None:
    point = load()
    options = dataclasses.replace(point.options, experiment="x" * 256)
    with pytest.raises(ValueError, match=r"^experiment: x+\.\.\. has 256 bytes, must be at most 255"):
        check_names(dataclasses.replace(point, options=options))


def test_an_argument_of_a_sweep_that_hydra_cannot_note_is_named(compose: Compose) -> None:
    with pytest.raises(HydraException) as failed:
        compose("tag=a,'${'", multirun=True)
    said = explain(failed.value)
    assert said.startswith("\"tag=a,'${'\" cannot be read (token recognition error")
    assert said.endswith("must be FIELD=VALUE or GROUP=CHOICE")


class TestRunId:
    def test_says_what_tells_points_apart(self, load: Load) -> None:
        assert re.fullmatch(r"skew-skew=0\.9-num_hot=2-[0-9a-f]{8}", load("router.skew=0.9", "router.num_hot=2").run_id)
        assert re.fullmatch(r"uniform-mytag-[0-9a-f]{8}", load("router=uniform", "tag=mytag").run_id)

    def test_changes_with_every_value_that_the_measurement_depends_on(self, load: Load) -> None:
        point = load("dataset=pydoc")
        leaves = [path for path in _leaves(point.config) if path[0] not in ("dataset", "simulator")]

        def run_id(path: tuple[str, ...]) -> str:
            options = make_options(_changed(point.config, path))
            return dataclasses.replace(point, options=options, simulated=options.backend != "ranks").run_id

        changing = {".".join(path) for path in leaves if run_id(path) != point.run_id}
        assert {".".join(path) for path in leaves} - changing == {
            "experiment", "results_dir", "force", "dry_run", "timeout_s", "trace.record", "trace.token_paths",
            "wandb.mode", "wandb.project", "slo.ttft_s", "slo.tpot_s", "slo.e2e_s",
            "slo.share",
        }  # fmt: skip

    def test_limits_count_where_they_say_which_rates_are_measured(self, load: Load) -> None:
        sweep = ("requests.arrivals=poisson", "requests.rate_per_s=5", "requests.rate_step=2", "slo.ttft_s=1")
        assert load(*sweep).run_id != load(*sweep, "slo.ttft_s=2").run_id
        assert load(*sweep).run_id != load(*sweep, "slo.share=0.99").run_id
        assert load(*sweep[:2]).run_id == load(*sweep[:2], "slo.ttft_s=2", "slo.share=0.99").run_id

    def test_of_software_only_that_of_the_systems_counts(self, load: Load) -> None:
        def run_id(*overrides: str) -> str:
            return load("backend=simulator", "hardware=dgx_h100", "system=[static_ep]", *overrides).run_id

        assert run_id("simulator.software.static_ep.plan_s=1") != run_id()
        assert run_id("simulator.software.drop.plan_s=1") == run_id()
        assert load("simulator.software.static_ep.plan_s=1").run_id == load().run_id, "real ranks read none"

    def test_systems_count(self, load: Load) -> None:
        assert load("system=[harmoeny]").run_id != load("system=[harmoeny,drop]").run_id

    def test_auto_is_the_device_that_it_means(self, load: Load) -> None:
        auto = load("device=auto")
        assert auto.run_id == load(f"device={auto.device_type}").run_id

    def test_text_counts_and_not_where_it_lies(self, load: Load, tmp_path: Path) -> None:
        def run_id(name: str, text: str) -> str:
            (tmp_path / name).write_text(text)
            return load("dataset=local", f"dataset.path={tmp_path / name}").run_id

        assert run_id("one", "text") == run_id("two", "text") != run_id("one", "another text")
        assert run_id("one", "text") != load().run_id


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(values, dict):
        yield path
    else:
        for key, value in values.items():
            yield from _leaves(value, (*path, key))


def _changed(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = path
    if rest:
        return values | {key: _changed(values[key], tuple(rest))}
    old = values[key]
    new = {"auto": "cuda", "": "x"}.get(old, f"{old}x") if isinstance(old, str) else 1 if old is None else old + 1
    return values | {key: new}


class TestRanks:
    def test_alone(self) -> None:
        assert joined_world_size() is None
        assert is_main_rank()

    def test_joined(self, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        assert joined_world_size() == 3
        assert not is_main_rank()
        assert load().options.world_size == 3  # conf/config.yaml takes it over
        with pytest.raises(ValueError, match=r"^world_size: 2, must be 3, the number of ranks that were started$"):
            load("world_size=2")
