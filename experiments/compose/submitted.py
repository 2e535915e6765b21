"""Checks points for the host that will run them: this one, or a node that SLURM picks."""

from __future__ import annotations

from omegaconf import DictConfig, open_dict

from experiments.compose.load import Components, load_point
from experiments.compose.plugins import chosen_plugin
from experiments.launch.environment import joined_world_size
from experiments.point.point import Point

#: The launcher of ``hydra/launcher=slurm``.
SLURM_LAUNCHER = "hydra_plugins.harmoeny_slurm.SlurmArray"


def is_submitted(config: DictConfig) -> bool:
    """Tell whether a configuration, with its ``hydra`` node, is one for SLURM's jobs."""
    return chosen_plugin(config, "launcher") == SLURM_LAUNCHER


def load_swept_point(config: DictConfig, components: Components) -> Point:
    """Check one point of a sweep.

    Args:
        config: its configuration with its ``hydra`` node. Where SLURM runs it, ``device=auto`` means CUDA if the job
            asks for GPUs, whatever this host has.
        components: what was built for other points of the sweep.

    Raises:
        ValueError: a field is wrong, or the job has no room for the ranks.
    """
    if not is_submitted(config):
        return load_point(config, components=components)
    if joined_world_size() is not None:
        raise ValueError("hydra/launcher: 'slurm', must be basic where torchrun or SLURM started ranks")
    if config.device == "auto":
        with open_dict(config):
            config.device = "cuda" if _asks_for_gpus(config.hydra.launcher) else "cpu"
    point = load_point(config, here=False, components=components)
    if not point.simulated:
        _check_room(point, config.hydra.launcher)
    return point


def _asks_for_gpus(launcher: DictConfig) -> bool:
    return bool(launcher.gpus_per_node or launcher.gpus_per_task or "gpu" in (launcher.gres or ""))


def _check_room(point: Point, launcher: DictConfig) -> None:
    world_size, tasks = point.options.world_size, launcher.nodes * launcher.tasks_per_node
    if tasks > 1 and world_size != tasks:
        raise ValueError(
            f"world_size: {world_size}, must be {tasks}, the ranks that SLURM starts "
            "(hydra.launcher.nodes x hydra.launcher.tasks_per_node)"
        )
    ranks_per_node = launcher.tasks_per_node if tasks > 1 else world_size
    if point.device_type == "cuda" and launcher.gpus_per_node and ranks_per_node > launcher.gpus_per_node:
        raise ValueError(
            f"hydra.launcher.gpus_per_node: {launcher.gpus_per_node}, must be at least {ranks_per_node}, "
            "the ranks of a node"
        )
