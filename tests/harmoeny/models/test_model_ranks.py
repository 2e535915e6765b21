"""Whole models on real ranks over gloo: exact on every rank, and loaded with one copy's worth of memory per host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import harmoeny
from baselines.even_split import EvenSplit
from tests.harmoeny.models.families import relative
from tests.harmoeny.models.saved import logits, save, unmodified
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

FAMILIES = ("gpt_oss", "deepseek_v3", "qwen2_moe", "switch_transformers")


def errors_of(rank: int, folder: str) -> dict[str, float]:
    """Return the largest relative error of every way in; ranks have batches of different sizes."""
    found = {}
    for name in FAMILIES:
        saved = Path(folder, name)
        batch = {"seed": 10 + rank, "batch_size": 2 + rank}
        wanted = logits(unmodified(saved), **batch)
        with harmoeny.load(saved, harmoeny.TokenHarMoEny(threshold=1)) as session:
            session.engine.recorder.enabled = True
            for policy in (harmoeny.TokenHarMoEny(threshold=1), EvenSplit(fetch="peer")):
                session.use(policy)
                session.engine.recorder.begin_iteration()
                found[f"load {name} {policy.name}"] = relative(logits(session.model, **batch), wanted)
                plans = [times.marks.plan for times in session.engine.recorder.collect()]
                elsewhere = sum(int(p.tokens[rank].sum() - p.tokens[rank, :, rank].sum()) for p in plans if p)
                assert elsewhere > 0, "no token went to the other rank"
        model = unmodified(saved)
        for exchange in ("collective", "put"):
            with harmoeny.attach(model, exchange=exchange) as session:
                found[f"attach {name} {exchange}"] = relative(logits(model, **batch), wanted)
                assert session.engine.memory.comm.exchange == exchange
        found[f"given back {name}"] = relative(logits(model, **batch), wanted)
    harmoeny.register(harmoeny.TokenHarMoEny(threshold=1))
    model = AutoModelForCausalLM.from_pretrained(Path(folder, "gpt_oss"), experts_implementation="harmoeny").eval()
    wanted = logits(unmodified(Path(folder, "gpt_oss")), seed=rank)
    found["register gpt_oss"] = relative(logits(model, seed=rank), wanted)
    return found | generation(rank, Path(folder, "qwen2_moe"))


def generation(rank: int, saved: Path) -> dict[str, float]:
    """Generate different numbers of tokens on the ranks, as docs/models.md says, and count the wrong ones."""
    prompt = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(rank))

    def generate(model: torch.nn.Module, *, synced: bool) -> Tensor:
        number = 3 + 2 * rank
        output: Tensor = model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=number, min_new_tokens=number, do_sample=False, synced_gpus=synced
        )
        return output

    wanted = generate(unmodified(saved), synced=False)
    with harmoeny.load(saved) as session:
        return {"generate": float((generate(session.model, synced=True) != wanted).sum())}


def test_models_are_exact_on_two_ranks(tmp_path: Path) -> None:
    for name in FAMILIES:
        save(name, tmp_path)
    for found in run_ranks(2, errors_of, tmp_path, str(tmp_path)):
        assert len(found) == 5 * len(FAMILIES) + 2
        assert max(found.values()) <= 1e-4, found


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="proportional memory is known on Linux only")
def test_eight_ranks_load_a_model_with_one_copy_of_it(tmp_path: Path) -> None:
    sizes = {}
    for name, hidden, intermediate, layers in (("warm", 32, 32, 1), ("model", 512, 2048, 2)):
        config = MixtralConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
        model = MixtralForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        sizes[name] = [p.nbytes for p in model.parameters()]
        del model
    command = [sys.executable, "-m", "tests.harmoeny.models.forked_ranks", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 0, answer.stderr
    grown = json.loads(answer.stdout.splitlines()[-1])
    one_copy, largest = sum(sizes["model"]), max(sizes["model"])
    assert one_copy > 200e6
    assert one_copy <= grown["after"] <= 1.1 * one_copy
    # While it moves, a tensor is there twice.
    assert one_copy <= grown["peak"] <= 1.1 * (one_copy + largest)
