"""Which of Hydra's plug-ins a configuration has chosen."""

from __future__ import annotations

from typing import Literal

from omegaconf import DictConfig, OmegaConf


def chosen_plugin(config: DictConfig, kind: Literal["sweeper", "launcher"]) -> str:
    """Return the import path of the class that sweeps or launches.

    Args:
        config: a configuration with its ``hydra`` node.
        kind: of plug-in.

    Raises:
        ValueError: there is none, since all of its options were set to something else.
    """
    target = OmegaConf.select(config.hydra, f"{kind}._target_")
    if not isinstance(target, str):
        raise ValueError(f"hydra.{kind}: {config.hydra.get(kind)!r}, must be left to the choice of hydra/{kind}")
    return target
