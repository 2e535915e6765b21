"""Checks a configuration completely, before any worker starts, and makes a point of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.messages import explain
from experiments.datasets.base import Dataset
from experiments.launch.environment import joined_world_size
from experiments.point.options import Options
from experiments.point.point import Point
from experiments.point.simulator_options import load_options
from experiments.routers.base import RoutedRun, Router
from experiments.routing.trace_files import read_about
from experiments.simulator.topology import Topology
from experiments.text.tokenizer import check_vocab_size
from harmoeny.hardware import Hardware
from harmoeny.models.base import ModelConfig
from harmoeny.policy import Policy
from harmoeny.runtime.layer.executor import find_executor

BACKENDS = ("ranks", "simulator")
DEVICES = ("auto", "cpu", "cuda")
WANDB_MODES = ("offline", "online", "disabled")
_PARTS: dict[str, type[Any]] = {"model": ModelConfig, "dataset": Dataset, "router": Router, "hardware": Hardware}


def load_point(config: DictConfig | Mapping[str, Any], *, here: bool = True) -> Point:
    """Check a configuration completely, before any worker starts.

    Args:
        config: the configuration.
        here: whether this host, and the ranks that were started on it, will run it; another may have other devices.

    Raises:
        ValueError: the first field that is wrong, its value and what is allowed.
    """
    try:
        raw = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
        assert isinstance(raw, Mapping)
        own = OmegaConf.create({str(k): v for k, v in raw.items() if k != "hydra"})
        values = cast(dict[str, Any], OmegaConf.to_container(own, resolve=True, throw_on_missing=True))
        _check_fields(values)
        parts = {name: _component(base, name, values[name]) for name, base in _PARTS.items()}
        parts["model"] = parts["model"].resolved()
        systems = {name: _component(Policy, f"systems.{name}", node) for name, node in values["systems"].items()}
        simulator = load_options(values["simulator"])
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    point = Point(values=values, systems=systems, simulator=simulator, **parts)
    _check(point)
    if here and point["backend"] == "ranks":
        _check_ranks(point)
    return point


def _check_fields(values: Mapping[str, Any]) -> None:
    """Refuse what ``+FIELD=`` added and ``~FIELD`` took away: nobody would read the one or do without the other."""
    names = [option.name for option in fields(Options)]
    for name in values:
        if name not in names:
            raise ValueError(f"{name}: no such field, must be one of {', '.join(names)}")
    for name in names:
        if name not in values:
            raise ValueError(f"{name}: missing, must be set")


def _component(base: type[Any], field_name: str, node: Any) -> Any:
    try:
        component = instantiate(node, _convert_="all")
    except HydraException as error:
        raise ValueError(f"{field_name}: {explain(error)}") from error
    if not isinstance(component, base):
        raise ValueError(f"{field_name}: {node!r}, must be a {base.__name__}; python run.py --help lists them")
    return component


def _check(point: Point) -> None:
    for name in ("world_size", "batch_size", "seq_len", "rounds", "timeout_s"):
        if point[name] < 1:
            raise ValueError(f"{name}: {point[name]}, must be at least 1")
    for name in ("warmup_rounds", "seed", "decode_tokens"):
        if point[name] < 0:
            raise ValueError(f"{name}: {point[name]}, must be at least 0")
    if point["device"] not in DEVICES:
        raise ValueError(f"device: {point['device']!r}, must be one of {', '.join(DEVICES)}")
    if point["wandb"]["mode"] not in WANDB_MODES:
        raise ValueError(f"wandb.mode: {point['wandb']['mode']!r}, must be one of {', '.join(WANDB_MODES)}")
    for name in ("experiment", "tag"):
        if not all(c.isalnum() or c in "-_." for c in point[name]) or point[name].startswith("."):
            raise ValueError(f"{name}: {point[name]!r}, must hold only letters, digits, '-', '_' and, inside, '.'")
    if not point["experiment"]:
        raise ValueError("experiment: '', must name the results' subfolder")
    if point["backend"] not in BACKENDS:
        raise ValueError(f"backend: {point['backend']!r}, must be one of {', '.join(BACKENDS)}")
    point.hardware.validate()
    if point["backend"] == "simulator":
        _check_simulation(point)
    point.model.validate()
    if point.model.tokenizer is None and point.reads_text:
        check_vocab_size(point.model.vocab_size)
    point.router.validate(point.model.num_experts, point.model.top_k)
    if not point.systems:
        raise ValueError("system: [], must name at least one system")
    for name, policy in point.systems.items():
        try:
            policy.validate()
            find_executor(policy.executor)
            policy.place(0, point.model.num_experts, point["world_size"])
        except ValueError as error:
            raise ValueError(f"systems.{name}.{error}") from error
        if policy.num_slots is not None and policy.num_slots > point.model.num_experts:
            raise ValueError(
                f"systems.{name}.num_slots: {policy.num_slots}, must be at most {point.model.num_experts} "
                "(model.num_experts)"
            )
        try:
            policy.validate_ranks(point.model.num_experts, point["world_size"])
        except ValueError as error:
            raise ValueError(f"{error} (systems.{name})") from error
    if point.router.limited:
        _check_routing(point)
    _check_recording(point)
    _check_phases(point)
    point.dataset.validate()
    _check_writable(Path(point["results_dir"]))


def _check_routing(point: Point) -> None:
    learners = {n: p.calibration_batches for n, p in point.systems.items() if p.calibration_batches}
    layer_tokens, _ = _shape(json.dumps(point["model"]), point["batch_size"], point["seq_len"])
    point.router.validate_run(RoutedRun(layer_tokens, point["world_size"], point["rounds"], learners))


@lru_cache(maxsize=8)
def _shape(model: str, batch_size: int, seq_len: int) -> tuple[list[int], bool]:
    """Return a model's tokens per MoE layer and whether it decodes.

    Drawing even the shapes of a large model takes seconds, so each is drawn once.
    """
    config: ModelConfig = _component(ModelConfig, "model", json.loads(model)).resolved()
    drawn = config.build(0, "meta")
    return drawn.layer_tokens(batch_size, seq_len), drawn.decodes


def _check_phases(point: Point) -> None:
    """Check what is measured beside the closed loop."""
    point.requests.validate()
    if point["backend"] == "simulator":
        for name, asked in (("requests.arrivals", point.requests.open_loop), ("decode_tokens", point["decode_tokens"])):
            if asked:
                raise ValueError(f"{name}: must be as in conf/config.yaml with backend=simulator")
    if point["decode_tokens"]:
        if not _shape(json.dumps(point["model"]), point["batch_size"], point["seq_len"])[1]:
            raise ValueError(
                f"decode_tokens: {point['decode_tokens']}, must be 0: model={point.model.name} is no decoder that "
                "keeps keys and values"
            )
        if point.router.limited:
            raise ValueError(f"decode_tokens: {point['decode_tokens']}, must be 0 with router={point.router.name}")


def _check_recording(point: Point) -> None:
    """Refuse a trace that nobody would write, or that would overwrite another run's."""
    record = point["trace"]["record"]
    if record is None:
        if point["trace"]["token_paths"]:
            raise ValueError("trace.token_paths: true, must be false without trace.record=PATH")
        return
    path = Path(record)
    if path.suffix != ".parquet":
        raise ValueError(f"trace.record: {record!r}, must be a path that ends in .parquet")
    if point["backend"] == "simulator":
        raise ValueError(f"trace.record: {record!r}, must be null with backend=simulator")
    if path.exists() and read_about(path).get("run_id") != point.run_id:
        raise ValueError(f"trace.record: {record!r} holds another run's routing, must be a new file for every point")


def _check_ranks(point: Point) -> None:
    joined = joined_world_size()
    if joined is not None and joined != point["world_size"]:
        raise ValueError(f"world_size: {point['world_size']}, must be {joined}, the number of ranks that were started")
    if point["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda', must be cpu or auto: this PyTorch sees no CUDA device")
    if point.device_type == "cuda" and joined is None and point["world_size"] > torch.cuda.device_count():
        raise ValueError(
            f"world_size: {point['world_size']}, must be at most {torch.cuda.device_count()}, the CUDA devices here"
        )


def _check_simulation(point: Point) -> None:
    """Refuse hardware that is not described well enough, and options that nobody would read."""
    if joined_world_size() is not None:
        raise ValueError("backend: 'simulator', must be ranks where torchrun or SLURM started ranks")
    for name in ("expert_flops_per_s", "host_link_bytes_per_s"):
        if getattr(point.hardware, name) is None:
            raise ValueError(
                f"hardware.{name}: null, must be set for backend=simulator: choose a hardware= that has it, "
                "or calibrate this machine (python -m scripts.calibrate)"
            )
    Topology(point.hardware, point["world_size"])
    for name in point.systems:
        point.simulator.batch_size_of(name, point["batch_size"], getattr(point.router, "skew", None))
    if point.router.from_model and point.simulator.batch_size:
        raise ValueError("simulator.batch_size: must be empty with router=model, whose routing is of one batch size")


def _check_writable(folder: Path) -> None:
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"results_dir: {str(folder)!r} cannot be written ({error.strerror}), must be a folder to write to"
        ) from error
