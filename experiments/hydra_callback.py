"""Before anything runs: check every point of the sweep, and write down which runs belong to it."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.cache import atomic_path
from experiments.config import Point, is_main_rank, load_point
from experiments.job import fail, say
from experiments.manifest import is_finished

#: Tells the report, which runs when the sweep has ended, where the sweep was written down.
SWEEP_DIR_VARIABLE = "HARMOENY_SWEEP_DIR"


class ValidateSweep(Callback):
    """Composes all points of a multirun as Hydra will, and stops with one clear error if any is wrong."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check all points and write ``sweeps/<sweep_id>/sweep.json``."""
        overrides = [*config.hydra.overrides.task]
        params = config.hydra.sweeper.params or {}
        parsed = OverridesParser.create().parse_overrides(overrides)
        given = {p.get_key_element() for p in parsed}
        overrides += [f"{key}={value}" for key, value in params.items() if key not in given]
        parsed = OverridesParser.create().parse_overrides(overrides)
        axes = [p.get_key_element() for p in parsed if p.is_sweep_override()]
        jobs = list(chain.from_iterable(BasicSweeper.split_arguments(parsed, None)))

        points = []
        for job in jobs:
            try:
                points.append(load_point(_compose(config, list(job))))
            except ValueError as error:
                fail(error, 2)
        _write_sweep(points, axes)


def _compose(config: DictConfig, overrides: list[str]) -> DictConfig:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None, "callbacks run inside Hydra"
    return hydra.config_loader.load_sweep_config(config, overrides)


def _write_sweep(points: list[Point], axes: list[str]) -> None:
    run_ids = [point.run_id for point in points]
    sweep_id = hashlib.sha256(json.dumps([axes, run_ids]).encode()).hexdigest()[:8]
    experiment = points[0]["experiment"]
    folder = Path(points[0]["results_dir"]) / experiment / "sweeps" / sweep_id
    os.environ[SWEEP_DIR_VARIABLE] = str(folder)
    if not is_main_rank():
        return
    content = {"sweep_id": sweep_id, "experiment": experiment, "axes": axes, "run_ids": run_ids}
    with atomic_path(folder / "sweep.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    todo = sum(not is_finished(point.folder) for point in points)
    say(f"{experiment}: {len(points)} points, {todo} to run; results in {folder.parent.parent}")
