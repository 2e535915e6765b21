"""Checks a point completely before any worker starts; the first thing that is wrong is named."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from experiments.compose.backends import backend_of
from experiments.launch.environment import joined_world_size
from experiments.point.options import GpuSharing, Options
from experiments.point.point import Point
from experiments.routers.base import RoutedRun
from experiments.routing.trace_files import read_about
from experiments.text.tokenizer import check_vocab_size
from harmoeny.choices import Exchange
from harmoeny.modelled import PadsBuffers
from harmoeny.placement import even_room
from harmoeny.policy import Policy, moves_shared
from harmoeny.runtime.layer.plan_executor import find_executor
from harmoeny.runtime.memory.residents import num_slots_needed
from results_schema.tables import TABLES

DEVICES = ("auto", "cpu", "cuda")
#: What Linux allows of a name, and of a whole path.
_NAME_BYTES, _PATH_BYTES = 255, 4095
WANDB_MODES = ("offline", "online", "disabled")

#: Plans grow with the square of the ranks: nothing has the memory for more.
_MOST_RANKS = 65_536


def check_point(point: Point) -> None:
    """Check everything that does not depend on the host that will run the point.

    Raises:
        ValueError: the first field that is wrong, its value and what is allowed.
    """
    _check_options(point)
    point.hardware.validate()
    if point.simulated and joined_world_size() is not None:
        raise ValueError(f"backend: {point.options.backend!r}, must be ranks where torchrun or SLURM started ranks")
    backend_of(point).check(point)
    point.model.validate()
    _check_positions(point)
    if point.model.tokenizer is None and point.reads_text:
        check_vocab_size(point.model.vocab_size)
    point.router.validate(point.model.num_experts, point.model.top_k)
    if not point.systems:
        raise ValueError("system: [], must name at least one system")
    for name, policy in point.systems.items():
        _check_system(name, policy, point)
    if point.router.limited:
        _check_routing(point)
    _check_recording(point)
    _check_extra_loops(point)
    point.dataset.validate()
    _check_writable(Path(point.options.results_dir))


def check_names(point: Point) -> None:
    """Check that the names of the run's folder and its experiment's are ones that a file system takes.

    Raises:
        ValueError: one is too long, or has a character that no name can have.
    """
    for field_name, name in (("experiment", point.options.experiment), ("the run's folder", point.run_id)):
        size = len(os.fsencode(name))
        if size > _NAME_BYTES:
            raise ValueError(
                f"{field_name}: {name[:60]}... has {size} bytes, must be at most {_NAME_BYTES}: "
                "choose a shorter experiment=, tag= or option of the router"
            )
    longest = point.folder.absolute() / ("." + max((table.file for table in TABLES), key=len) + ".12345678.parquet")
    if (size := len(os.fsencode(longest))) > _PATH_BYTES:
        raise ValueError(f"results_dir: paths in it have {size} bytes, must be at most {_PATH_BYTES}: choose another")


def _check_options(point: Point) -> None:
    options = point.options
    for name in ("world_size", "ranks_per_gpu", "batch_size", "seq_len", "rounds", "timeout_s"):
        _check_at_least(1, name, getattr(options, name))
    for name in ("warmup_rounds", "seed", "decode_tokens", "host_threads"):
        _check_at_least(0, name, getattr(options, name))
    if options.world_size > _MOST_RANKS:
        raise ValueError(f"world_size: {options.world_size}, must be at most {_MOST_RANKS}")
    _check_until(point)
    if options.device not in DEVICES:
        raise ValueError(f"device: {options.device!r}, must be one of {', '.join(DEVICES)}")
    _check_sharing(options, simulated=point.simulated)
    if options.exchange not in list(Exchange):
        raise ValueError(f"exchange: {options.exchange!r}, must be one of {', '.join(Exchange)}")
    if point.simulated and options.exchange != Exchange.AUTO:
        raise ValueError(f"exchange: {options.exchange!r}, must be auto with backend={options.backend}")
    if options.wandb.mode not in WANDB_MODES:
        raise ValueError(f"wandb.mode: {options.wandb.mode!r}, must be one of {', '.join(WANDB_MODES)}")
    for name, value in (("experiment", options.experiment), ("tag", options.tag)):
        if not all(c.isalnum() or c in "-_." for c in value) or value.startswith("."):
            raise ValueError(f"{name}: {value!r}, must hold only letters, digits, '-', '_' and, inside, '.'")
    if not options.results_dir:
        raise ValueError("results_dir: '', must be a folder; '.' is the current one")
    if not options.experiment:
        raise ValueError("experiment: '', must name the results' subfolder")


def _check_until(point: Point) -> None:
    options = point.options
    if options.until is None:
        for name in ("max_rounds", "max_minutes"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name}: {value}, must be null without until=")
        return
    if not 0 < options.until < 1:
        raise ValueError(f"until: {options.until}, must be above 0 and below 1: 0.02 for 2 % to both sides of a ratio")
    if len(point.systems) < 2:
        raise ValueError(f"until: {options.until}, must be null for a single system, which has no ratio")
    if point.simulated:
        raise ValueError(f"until: {options.until}, must be null with backend={options.backend}: set rounds=")
    if options.max_rounds is not None and options.max_rounds < options.rounds:
        raise ValueError(f"max_rounds: {options.max_rounds}, must be at least {options.rounds} (rounds)")
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise ValueError(f"max_minutes: {options.max_minutes}, must be above 0")


def _check_sharing(options: Options, *, simulated: bool) -> None:
    if options.gpu_sharing not in list(GpuSharing):
        raise ValueError(f"gpu_sharing: {options.gpu_sharing!r}, must be one of {', '.join(GpuSharing)}")
    if options.ranks_per_gpu > 1 and simulated:
        raise ValueError(f"ranks_per_gpu: {options.ranks_per_gpu}, must be 1 with backend={options.backend}")
    if options.ranks_per_gpu > 1 and options.exchange == Exchange.COLLECTIVE:
        raise ValueError(
            f"exchange: 'collective', must be auto or put with ranks_per_gpu={options.ranks_per_gpu}: NCCL refuses "
            "ranks on one GPU, and gloo sends nothing from one to another"
        )


def _check_positions(point: Point) -> None:
    options, limit = point.options, point.model.max_positions
    length = options.seq_len + options.num_decode_steps
    if limit is not None and length > limit:
        what = "seq_len"
        if options.num_decode_steps:
            more = (
                "decode_tokens" if options.decode_tokens == options.num_decode_steps else "requests.output_tokens - 1"
            )
            what = f"seq_len + {more}"
        raise ValueError(
            f"{what}: {length}, must be at most {limit}, the positions of the model "
            "(max_position_embeddings of its configuration)"
        )


def _check_at_least(limit: int, name: str, value: int) -> None:
    if value < limit:
        raise ValueError(f"{name}: {value}, must be at least {limit}")


def _check_system(name: str, policy: Policy, point: Point) -> None:
    num_experts, world_size = point.model.num_experts, point.options.world_size
    try:
        policy.validate()
        find_executor(policy.executor)
        resident = policy.place(0, num_experts, world_size).resident
    except ValueError as error:
        raise ValueError(f"systems.{name}.{error}") from error
    if policy.num_slots is not None and policy.num_slots > num_experts:
        raise ValueError(
            f"systems.{name}.num_slots: {policy.num_slots}, must be at most {num_experts} (model.num_experts)"
        )
    try:
        policy.validate_ranks(num_experts, world_size)
    except ValueError as error:
        raise ValueError(f"{error} (systems.{name})") from error
    if point.options.spare_slots is not None:
        _check_room(name, policy, point)
    _check_shared(name, policy, point, int(resident.sum(axis=0).max()))
    _check_host(name, policy, point)


def _check_host(name: str, policy: Policy, point: Point) -> None:
    """Refuse a system that computes on hosts where none computes."""
    if not policy.needs_host:
        return
    if point.simulated and point.hardware.host_flops_per_s is None:
        raise ValueError(f"hardware.host_flops_per_s: null, must be set for systems.{name}, which computes on the host")
    if not point.simulated and point.options.host_threads == 0:
        raise ValueError(f"host_threads: 0, must be at least 1 for systems.{name}, which computes on the host")


def _check_shared(name: str, policy: Policy, point: Point, most_residents: int) -> None:
    """Refuse a system that does nothing without shared experts, and those that cannot do with them."""
    num_shared = point.model.num_shared
    if num_shared == 0:
        if moves_shared(type(policy)):
            raise ValueError(
                f"systems.{name}: must go with a model that hands its shared experts to the runtime: "
                "model.num_shared_experts=1 for moe_stack, model.route_shared=true for those of Transformers"
            )
        return
    what = f"model: {num_shared} shared experts in the runtime, must be none with systems.{name}"
    padded = name in point.simulator.software and point.simulator.software[name].padded
    if isinstance(policy, PadsBuffers) or padded:
        raise ValueError(f"{what}, whose buffers are of equal size for all experts")
    if policy.num_slots is not None and policy.num_slots < most_residents:
        raise ValueError(f"{what}, whose ranks have fewer slots ({policy.num_slots}) than residents ({most_residents})")


def _check_room(name: str, policy: Policy, point: Point) -> None:
    """Refuse a system with more or less room for experts than all have."""
    spare_slots, num_experts, world_size = point.options.spare_slots, point.model.num_experts, point.options.world_size
    assert spare_slots is not None
    resident = policy.place(0, num_experts, world_size).resident
    room = num_slots_needed(resident.sum(axis=0), num_experts, policy.room(num_experts, world_size))
    wanted = even_room(num_experts, world_size, spare_slots)
    if (room != wanted).any():
        raise ValueError(
            f"spare_slots: {spare_slots}, must be null with systems.{name}, whose ranks hold {room.max()} experts of a "
            f"layer, not {wanted}"
        )


@dataclass(frozen=True)
class _Shape:
    """What checks need to know of a model without weights: tokens per MoE layer, and what it computes after them."""

    layer_tokens: list[int]
    decodes: bool
    serves: bool


#: Drawing even the shapes of a large model takes seconds, so each is drawn once per process.
_SHAPES: dict[str, _Shape] = {}


def _shape(point: Point) -> _Shape:
    options = point.options
    key = json.dumps([options.model, options.batch_size, options.seq_len])
    if key not in _SHAPES:
        model = point.model.build(0, "meta")
        _SHAPES[key] = _Shape(model.layer_tokens(options.batch_size, options.seq_len), model.decodes, model.serves)
    return _SHAPES[key]


def _check_routing(point: Point) -> None:
    learners = {n: p.calibration_batches for n, p in point.systems.items() if p.calibration_batches}
    options = point.options
    point.router.validate_run(RoutedRun(_shape(point).layer_tokens, options.world_size, point.most_rounds, learners))


def _check_extra_loops(point: Point) -> None:
    """Check what is measured beside the closed loop."""
    requests, decode_tokens = point.options.requests, point.options.decode_tokens
    requests.validate()
    point.options.slo.validate()
    if requests.rate_step is not None and not point.options.slo.limits:
        raise ValueError(
            f"requests.rate_step: {requests.rate_step}, must be null without limits to fall behind: set slo.ttft_s, "
            "slo.tpot_s or slo.e2e_s, or choose a slo="
        )
    if decode_tokens:
        _check_decodes(point, "decode_tokens", decode_tokens, 0)
    if requests.output_tokens > 1:
        _check_decodes(point, "requests.output_tokens", requests.output_tokens, 1)
        if not _shape(point).serves:
            raise ValueError(
                f"requests.output_tokens: {requests.output_tokens}, must be 1: this model keeps more than keys "
                "and values of all tokens, so sequences of different lengths cannot be computed together"
            )


def _check_decodes(point: Point, name: str, value: int, none: int) -> None:
    """Refuse tokens after the first where nobody knows them; ``none``: the value that asks for none."""
    if point.simulated and point.router.from_model:
        raise ValueError(
            f"{name}: {value}, must be {none} with backend={point.options.backend} and "
            f"router={point.router.name}: what a model decodes depends on its weights"
        )
    if not _shape(point).decodes:
        raise ValueError(
            f"{name}: {value}, must be {none}: model={point.model.name} is no decoder that keeps keys and values"
        )
    if reason := point.router.why_no_steps():
        raise ValueError(f"{name}: {value}, must be {none} with router={point.router.name}: {reason}")


def _check_recording(point: Point) -> None:
    """Refuse a trace that nobody would write, or that would overwrite another run's."""
    record = point.options.trace.record
    if record is None:
        if point.options.trace.token_paths:
            raise ValueError("trace.token_paths: true, must be false without trace.record=PATH")
        return
    path = Path(record)
    if path.suffix != ".parquet":
        raise ValueError(f"trace.record: {record!r}, must be a path that ends in .parquet")
    if point.simulated:
        raise ValueError(f"trace.record: {record!r}, must be null with backend={point.options.backend}")
    if path.exists() and read_about(path).get("run_id") != point.run_id:
        raise ValueError(f"trace.record: {record!r} holds another run's routing, must be a new file for every point")


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
