"""Every run that the pages show ends with numbers: one point of each, tiny, in this process.

Real ranks are one here; what starts several is tested in tests/experiments/launch and tests/cluster.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig

from experiments.compose.backends import backend_of
from experiments.compose.swept import leave_out_absent, sweep_points
from experiments.launch.rank import run_rank
from experiments.text.prepare import prepare_point
from tests.conftest import Compose
from tests.docs.test_commands import RUNS, as_typed, saved
from tests.experiments.runs import begin
from tests.harmoeny.models.saved import save
from tests.strategies import few_values

__all__ = ["saved"]
TINY = ["batch_size=1", "seq_len=8", "rounds=1", "warmup_rounds=0"]
#: They are ranks: `make check` leaves them out.
pytestmark = pytest.mark.ranks
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
        output_tokens = min(config.requests.output_tokens, 2)
        words += ["requests.per_round=1", "requests.rate_step=null", f"requests.output_tokens={output_tokens}"]
    if config.decode_tokens > 2:
        words += ["decode_tokens=2"]
    if config.backend == "ranks":
        words = [w for w in words if not re.match(r"world_size|model\.(random_weights|num_layers|num_experts)=", w)]
        words += ["world_size=1", *tiny_model(config, words, tmp_path)]
    config = compose(*words, multirun=True)
    leave_out_absent(config)
    few_values(config, 1)  # test_commands.py checks all points
    ((point, _),), _ = sweep_points(config)
    runs = begin(point)
    tokens = prepare_point(point) if point.reads_text else None
    if point.simulated:
        backend_of(point).run(runs, tokens)
    else:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert tokens is not None
        run_rank(runs, tokens)
    layers = pd.read_parquet(runs[0].folder.path / "layers.parquet")
    assert set(layers["system"]) == set(point.systems)
    assert (layers["layer_s"] > 0).all()


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
