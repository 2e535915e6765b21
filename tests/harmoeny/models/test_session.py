"""The library's way in, on one rank: load, attach and register against unmodified models from disk."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import harmoeny
from baselines.even_split import EvenSplit
from tests.harmoeny.models.families import DOCUMENT, relative
from tests.harmoeny.models.saved import DECODERS, PROMISED, logits, save, unmodified

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.many
@pytest.mark.parametrize("name", PROMISED)
def test_loaded_model_is_the_saved_one(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    model = unmodified(folder)
    wanted = logits(model)
    with harmoeny.load(folder, harmoeny.TokenHarMoEny(threshold=1)) as session:
        session.engine.recorder.enabled = True
        session.engine.recorder.begin_iteration()
        assert relative(logits(session.model), wanted) <= 1e-4
        assert session.engine.recorder.collect(), "no MoE layer went through the engine"
    with harmoeny.attach(model) as session:
        held = {name for name, _ in model.named_parameters()}
        assert relative(logits(model), wanted) <= 1e-4
    given_back = dict(model.named_parameters())
    assert len(held) < len(given_back)
    torch.testing.assert_close(logits(model), wanted)
    original = unmodified(folder)
    for parameter_name, parameter in original.named_parameters():
        assert torch.equal(given_back[parameter_name], parameter)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_an_implementation_by_name_needs_nothing_else(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    wanted = logits(unmodified(folder))
    harmoeny.register(harmoeny.TokenHarMoEny(threshold=1))
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="harmoeny")
    num_parameters = sum(p.numel() for p in model.parameters())
    assert relative(logits(model), wanted) <= 1e-4
    assert sum(p.numel() for p in model.parameters()) < num_parameters, "the engine holds the experts now"
    switched = unmodified(folder)
    switched.set_experts_implementation("harmoeny")
    assert relative(logits(switched), wanted) <= 1e-4


def test_policies_change_in_a_session(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    wanted = logits(unmodified(folder))
    with harmoeny.load(folder) as session:
        for policy in (EvenSplit(), harmoeny.HarMoEny(fetch="sync", num_slots=2), harmoeny.HarMoEny(fetch="none")):
            session.use(policy)
            assert relative(logits(session.model), wanted) <= 1e-4
        with pytest.raises(ValueError, match="threshold: 0"):
            session.use(harmoeny.TokenHarMoEny(threshold=0))


def test_an_exchange_that_there_is_not_is_refused(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    model = unmodified(folder)
    refusal = "exchange: 'nccl', must be one of auto, collective, put"
    with pytest.raises(ValueError, match=refusal):
        harmoeny.load(folder, exchange="nccl")
    with pytest.raises(ValueError, match=refusal):
        harmoeny.attach(model, exchange="nccl")
    assert torch.equal(logits(model), logits(unmodified(folder)))


def test_generation_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    prompt = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = unmodified(folder).generate(prompt, **options)
    with harmoeny.load(folder) as session:
        assert torch.equal(session.model.generate(prompt, **options), wanted)


def test_training_is_refused(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with harmoeny.attach(model), pytest.raises(RuntimeError, match="inference"):
        model(input_ids=torch.tensor([[4, 5]]))


def test_another_implementation_in_an_open_session_is_refused(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    model, wanted = unmodified(folder), logits(unmodified(folder))
    with harmoeny.attach(model):
        model.set_experts_implementation("grouped_mm")  # the same happens to models that share a configuration
        with pytest.raises(RuntimeError, match="experts_implementation: 'grouped_mm', must stay 'harmoeny'"):
            logits(model)
        model.set_experts_implementation("harmoeny")
        assert relative(logits(model), wanted) <= 1e-4
    torch.testing.assert_close(logits(model), wanted)


def test_model_without_experts_is_refused() -> None:
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match="BertModel has no layer"):
        harmoeny.attach(BertModel(config))


def test_experts_that_do_more_than_they_declare_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(save("mixtral", tmp_path))
    decorated = MixtralExperts.forward

    def doubled(self: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = 2 * decorated.__wrapped__(self, *arguments)
        return output

    wanted = logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(MixtralExperts, "forward", doubled)
        with pytest.raises(ValueError, match="MixtralExperts: its own code computes something else"):
            harmoeny.attach(model)
    assert torch.equal(logits(model), wanted), "a refused model is left as it was"


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save("mixtral", tmp_path))
    before = set(model.state_dict())
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"MixtralExperts\.down_proj"):
        harmoeny.attach(model)
    assert set(model.state_dict()) == before


@pytest.mark.programs
def test_import_is_cheap() -> None:
    code = "import sys, harmoeny; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


@pytest.mark.programs
def test_modules_of_models_import_transformers_only_when_a_model_is_used() -> None:
    code = (
        "import importlib, pkgutil, sys, harmoeny.models, harmoeny.session; "
        "names = [m.name for m in pkgutil.walk_packages(harmoeny.models.__path__, 'harmoeny.models.')]; "
        "[importlib.import_module(name) for name in names]; "
        "print(len(names) > 5, [m for m in ('transformers', 'huggingface_hub') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "True []"


@pytest.mark.parametrize("name", DECODERS[:1])
def test_examples_of_the_documentation_run(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    with torch.no_grad():
        wanted = unmodified(folder)(input_ids=torch.tensor([[5, 6, 7]])).logits
    names: dict[str, Any] = {}
    for block in blocks:
        names.pop("logits", None)
        exec(block.replace("path/to/model", str(folder)), names)
        assert relative(names["logits"], wanted) <= 1e-4
    names["session"].close()


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_an_open_session_refuses_to_be_saved_and_attached_again(name: str, tmp_path: Path) -> None:
    model = unmodified(save(name, tmp_path))
    wanted = logits(model)
    with harmoeny.attach(model) as session:
        refusal = r"cannot be saved while harmoeny holds its weights: session\.close\(\) gives them back$"
        with pytest.raises(RuntimeError, match=refusal):
            model.save_pretrained(tmp_path / "open")
        assert not list(tmp_path.glob("open/*.safetensors"))
        for part in (model, max(model.children(), key=lambda child: len(list(child.modules())))):
            with pytest.raises(RuntimeError, match=refusal):
                torch.save(part.state_dict(), tmp_path / "open.pt")
        with pytest.raises(ValueError, match=r"is attached already: call session\.close\(\) first, or .* session\.use"):
            harmoeny.attach(model)
        with pytest.raises(ValueError, match=r"has no layer that harmoeny\.register attached; session\.close\(\)"):
            harmoeny.detach(model)
        assert relative(logits(session.model), wanted) <= 1e-4, "the session goes on"
    _assert_saves(model, tmp_path / "closed" / name, wanted)
    with harmoeny.attach(model):
        assert relative(logits(model), wanted) <= 1e-4


def test_a_model_attached_by_name_is_saved_once_it_is_detached(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    wanted = logits(unmodified(folder))
    harmoeny.register(harmoeny.TokenHarMoEny(threshold=1))
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="harmoeny")
    with pytest.raises(ValueError, match=r"no layer that harmoeny\.register attached"):
        harmoeny.detach(model)
    logits(model)
    with pytest.raises(RuntimeError, match=r"cannot be saved .*: harmoeny\.detach\(model\) gives them back$"):
        model.save_pretrained(tmp_path / "open")
    with pytest.raises(ValueError, match=r"is attached already, by harmoeny\.register: call harmoeny\.detach\(model\)"):
        harmoeny.attach(model)
    harmoeny.detach(model)
    torch.testing.assert_close(logits(model), wanted)
    _assert_saves(model, tmp_path / "detached" / "mixtral", wanted)
    with harmoeny.attach(model, EvenSplit()):
        assert relative(logits(model), wanted) <= 1e-4


def _assert_saves(model: Any, folder: Path, wanted: torch.Tensor) -> None:
    folder.parent.mkdir()
    model.save_pretrained(folder)
    torch.testing.assert_close(logits(unmodified(folder)), wanted)


def test_a_policy_is_no_name(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    name: Any = "harmoeny"
    with pytest.raises(ValueError, match=r"^policy: 'harmoeny', must be a policy, such as harmoeny\.HarMoEny\(\)"):
        harmoeny.load(folder, name)
    with pytest.raises(ValueError, match=r"^policy: 'harmoeny'"):
        harmoeny.attach(unmodified(folder), name)
    with pytest.raises(ValueError, match=r"^policy: 'harmoeny'"):
        harmoeny.register(name)
    with harmoeny.load(folder) as session, pytest.raises(ValueError, match=r"^policy: 'harmoeny'"):
        session.use(name)
