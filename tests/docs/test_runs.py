"""Every run that the pages show ends with numbers: one point of each, tiny, in this process.

Real ranks are one here; what starts several is tested in tests/experiments/launch and tests/cluster.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.compose.backends import backend_of
from experiments.compose.sweep_callback import leave_out_absent, sweep_points
from experiments.launch.rank import run_rank
from experiments.text.prepare import prepare_point
from tests.conftest import Compose
from tests.docs.test_commands import RUNS, as_typed, saved
from tests.experiments.runs import begin
from tests.harmoeny.models.saved import save
from tests.strategies import few_points

__all__ = ["saved"]
TINY = ["batch_size=1", "seq_len=8", "rounds=1", "warmup_rounds=0"]
#: Saved in place of what a page takes from the hub, by the beginning of its name there.
FAMILIES = {"switch": "switch_transformers", "qwen1.5": "qwen2_moe", "mixtral": "mixtral", "olmoe": "olmoe"}


#: These run nothing here: tests/experiments/compose has dry runs, tests/cluster what SLURM starts.
NOT_HERE = ("dry_run", "hydra/launcher=slurm")


@pytest.mark.parametrize("command", [c for c in RUNS if not any(word in c for word in NOT_HERE)])
def test_it_ends_with_numbers(
    command: str, compose: Compose, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No hub is needed for random text.
    words = [re.sub(r"^dataset=(?!local).*", "dataset=random", w) for w in as_typed(command, saved)]
    words = [w.replace("trace.record=", f"trace.record={tmp_path}/") for w in words]
    words += [*TINY, f"results_dir={tmp_path / 'results'}"]
    config = compose(*words, multirun=True)
    if config.requests.arrivals != "closed":
        words += ["requests.per_round=1", "requests.rate_step=null"]
    if config.decode_tokens > 2:
        words += ["decode_tokens=2"]
    if config.backend == "ranks":
        words = [w for w in words if not re.match(r"world_size|model\.(random_weights|num_layers|num_experts)=", w)]
        words += ["world_size=1", *tiny_model(config, words, tmp_path)]
    config = compose(*words, multirun=True)
    leave_out_absent(config)
    first_values(config)
    ((point, _),), _ = sweep_points(config)
    runs = begin(point)
    tokens = prepare_point(point) if point.reads_text else None
    if point.simulated:
        backend_of(point).run(runs, tokens)
    else:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        threads = torch.get_num_threads()
        assert tokens is not None
        run_rank(runs, tokens)
        torch.set_num_threads(threads)
    layers = pd.read_parquet(runs[0].folder.path / "layers.parquet")
    assert set(layers["system"]) == set(point.systems)
    assert (layers["layer_s"] > 0).all()


def first_values(config: DictConfig) -> None:
    """Leave the first value of everything that is swept; test_commands.py checks all points."""
    parse = OverridesParser.create().parse_override

    def first(typed: str) -> str:
        override = parse(typed)
        return (
            f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else typed
        )

    sweeper, typed = config.hydra.sweeper, OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    config.hydra.overrides.task = [first(str(override)) for override in typed]
    for name, values in dict(sweeper.params or {}).items():
        sweeper.params[name] = first(f"{name}={values}").partition("=")[2]
    few_points(config)


def tiny_model(config: DictConfig, words: list[str], folder: Path) -> list[str]:
    """Return the overrides that put a tiny model of the same family in place of the usual one, or one from the hub."""
    model = config.model
    if model.get("hub_name") and not model.get("local_path"):
        family = model.hub_name.rpartition("/")[2].lower()
        name = next(of for begin, of in FAMILIES.items() if family.startswith(begin))
        sizes = {"num_experts": 16} if name == "switch_transformers" else {}
        return [f"model.local_path={save(name, folder, vocab_size=512, **sizes)}"]
    usual = config.hydra.runtime.choices.model == "switch_mini" and not any(w.startswith("model.") for w in words)
    return ["model=switch_tiny"] if usual else []
