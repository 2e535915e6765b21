"""The harness's adapter: pinned routing, configuration, and the architectures of conf/model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from torch import Tensor

from baselines.waterfill import Waterfill
from experiments.datasets.local import Local
from experiments.text.tokens import prepare_tokens
from harmoeny.models.kit.loading import build_module, config_from, limit_layers
from harmoeny.models.switch import SwitchModel
from harmoeny.models.transformers import Transformers, TransformersModel
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.recorder import PHASES, Phase
from tests.harmoeny.models.families import relative
from tests.harmoeny.models.saved import save, unmodified
from tests.harmoeny.runtime.cases import start

CONF = Path(__file__).parents[3] / "conf" / "model"
#: What the papers or model cards say, in billions.
PARAMETERS = {
    "switch_base_128": 7.4,
    "qwen15_moe": 14.3,
    "qwen2_57b": 57.4,
    "qwen3_30b_a3b": 30.5,
    "mixtral_8x7b": 46.7,
    "olmoe": 6.92,
    "deepseek_v2_lite": 15.7,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def attached(folder: Path) -> tuple[TransformersModel, ExpertParallel]:
    model = Transformers(local_path=str(folder)).build(0)
    assert isinstance(model, TransformersModel)
    engine = start(model.experts)
    model.connect(engine)
    engine.use(engine.build_system("x", TokenHarMoEny(threshold=1)))
    return model, engine


def both(model: TransformersModel, input_ids: Tensor, pinned: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the output of the engine and of the model's own code."""
    outputs = []
    with torch.inference_mode():
        for dense in (False, True):
            model.context.dense = dense
            model.context.tape.pin(pinned)
            outputs.append(model.forward(input_ids))
    model.context.dense = False
    return outputs[0], outputs[1]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_pinned_routing_is_executed_by_engine_and_reference(name: str, tmp_path: Path) -> None:
    """Independent truth: renamed experts, pinned by their new names, are the same model."""
    folder = save(name, tmp_path)
    input_ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = unmodified(folder)(input_ids=input_ids).logits[:, -1]
    model, engine = attached(folder)
    engine.recorder.begin_iteration()
    for output in both(model, input_ids, None):
        assert relative(output, wanted) <= 1e-5
    own = model.context.tape.recorded
    assert [tuple(ids.shape) for ids in own] == [(14, 2)] * 2
    assert model.layer_tokens(2, 7) == [14, 14]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for layer in model.experts:
        layer.weights.update({name: weights[order] for name, weights in layer.weights.items()})
    engine = start(model.experts)
    model.connect(engine)
    engine.use(engine.build_system("x", TokenHarMoEny(threshold=1)))
    new_name = torch.argsort(order)
    for output in both(model, input_ids, [new_name[ids] for ids in own]):
        assert relative(output, wanted) <= 1e-5
    for output in both(model, input_ids, own):
        assert relative(output, wanted) > 1e-2, "other experts give another output"


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_a_shared_expert_that_is_handed_over_is_the_models(name: str, tmp_path: Path) -> None:
    """Qwen weights it by a sigmoid, and here each is twice as wide as the routed experts."""
    wide = {"shared_expert_intermediate_size": 48} if name == "qwen2_moe" else {"n_shared_experts": 2}
    folder = save(name, tmp_path, **wide)
    input_ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = unmodified(folder)(input_ids=input_ids).logits[:, -1]
    config = Transformers(local_path=str(folder), route_shared=True)
    config.validate()
    assert config.num_shared == 2
    model = config.build(0)
    assert isinstance(model, TransformersModel)
    assert [(layer.num_experts, layer.num_routed) for layer in model.experts] == [(8, 6)] * 2
    for scale in (1, 0):
        for layer in model.experts:
            layer.weights["down"][layer.num_routed :] *= scale
        engine = start(model.experts)
        model.connect(engine)
        engine.use(engine.build_system("x", Waterfill()))
        for output in both(model, input_ids, None):
            assert relative(output, wanted) <= 1e-5 if scale else relative(output, wanted) > 1e-3
    model.adapted.restore()
    names = {n for n, _ in model.module.named_parameters()} ^ {n for n, _ in unmodified(folder).named_parameters()}
    assert names == set()


def test_assignments_that_are_left_out_contribute_nothing(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    input_ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    model, _ = attached(folder)
    zeroed = unmodified(folder)
    with torch.no_grad():
        for layer in zeroed.model.layers:
            layer.mlp.experts.down_proj.zero_()
        wanted = zeroed(input_ids=input_ids).logits[:, -1]
    for output in both(model, input_ids, [torch.full((14, 2), -1)] * 2):
        assert relative(output, wanted) <= 1e-5


def test_layers_are_recorded_from_their_router_on(tmp_path: Path) -> None:
    model, engine = attached(save("qwen2_moe", tmp_path))
    engine.recorder.begin_iteration()
    with torch.inference_mode():
        model.forward(torch.tensor([[5, 6, 7]]))
    layers = engine.recorder.collect()
    assert [times.marks.layer for times in layers] == [0, 1]
    for times in layers:
        assert len(times.boundary_s) == len(PHASES) + 1
        assert times.phase_s(Phase.ROUTE) > 0
        assert times.marks.num_assignments == 3 * 2


@pytest.mark.many
@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml") if "hub_name" in p.read_text()))
def test_architectures_have_their_published_size(name: str) -> None:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("defaults") == ["transformers"]
    if name in PARAMETERS:
        module = build_module(config_from(values["architecture"], name), None, torch.float32, on_meta=True)
        num_parameters = sum(p.numel() for p in module.parameters())
        assert num_parameters == pytest.approx(PARAMETERS[name] * 1e9, rel=5e-3)
    short = Transformers(**values, random_weights=True, num_layers=4)
    short.validate()
    model = short.build(0, "meta")
    switch = isinstance(model, SwitchModel)
    assert len(model.experts) == (4 if switch or name != "deepseek_v2_lite" else 3)
    if switch:
        assert model.stacks == [0, 0, 1, 1]
    assert model.num_experts == short.resolved().num_experts
    assert short.tokenizer is None


def test_wrong_configurations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("qwen3_moe", tmp_path)
    names = ("bare", "pickled", "quantised", "foreign", "negative")
    bare, pickled, quantised, foreign, negative = (tmp_path / name for name in names)
    for copy in (pickled, quantised, foreign, negative):
        shutil.copytree(folder, copy)
    bare.mkdir()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    change_config(quantised, quantization_config={"quant_method": "mxfp4"})
    change_config(foreign, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    change_config(negative, vocab_size=-5)
    here: dict[str, Any] = {"local_path": str(folder)}
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "model.local_path: null"),
        ({"local_path": str(tmp_path / "none")}, "model.local_path: .*must be a folder.*random_weights=true"),
        ({"local_path": str(bare)}, "no readable config.json"),
        ({"local_path": str(pickled)}, "no \\*.safetensors"),
        ({"local_path": str(quantised)}, "is quantised"),
        ({"local_path": str(foreign)}, "model_type 'mine'.*never run"),
        ({"local_path": str(negative)}, "its configuration says vocab_size -5, must be at least 1"),
        ({"hub_name": "no/such-model"}, "model.hub_name: 'no/such-model' is not in this machine's hub cache"),
        (here | {"num_layers": 3}, "model.num_layers: 3, must be 1 to 2"),
        (here | {"num_experts": 4}, "model.num_experts: 4, must be 0 or 6"),
        (here | {"dtype": "float16"}, "model.dtype"),
        (here | {"route_shared": True}, "model.route_shared: true, .* model.layers.0.mlp has no shared expert"),
        ({"random_weights": True, "architecture": {"model_type": "bert"}}, "number of experts"),
        (
            {"random_weights": True, "architecture": {"model_type": "llama", "num_local_experts": 2, "moe_k": 1}},
            "LlamaForCausalLM has no layer",
        ),
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            Transformers(**options).validate()
    Transformers(**here).validate()
    Transformers(local_path=str(pickled), random_weights=True).validate()


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_weights_are_an_error_not_random(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    change_config(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"lacks .* weights that a qwen3_moe needs"):
        Transformers(local_path=str(folder)).build(0)


def test_first_layers_only(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    whole = unmodified(folder)
    del whole.model.layers[1:]
    whole.config.num_hidden_layers = 1
    input_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = whole(input_ids=input_ids, use_cache=False).logits[:, -1]
    model = Transformers(local_path=str(folder), num_layers=1).build(0)
    model.context.dense = True
    with torch.inference_mode():
        assert relative(model.forward(input_ids), wanted) <= 1e-5


def test_limit_layers_cuts_lists_per_layer() -> None:
    config = config_from({"model_type": "gpt_oss", "num_hidden_layers": 4}, "x")
    assert len(config.layer_types) == 4
    limit_layers(config, 3)
    assert (config.num_hidden_layers, len(config.layer_types)) == (3, 3)


def test_random_weights_depend_on_the_seed_only(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    config = Transformers(local_path=str(folder), random_weights=True)
    first, again, other = (config.build(seed) for seed in (1, 1, 2))
    assert torch.equal(first.experts[0].weights["down"], again.experts[0].weights["down"])
    assert not torch.equal(first.experts[0].weights["down"], other.experts[0].weights["down"])


def test_text_goes_through_the_models_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path / "cache"))
    folder = save("qwen3_moe", tmp_path)
    assert Transformers(local_path=str(folder)).tokenizer is None
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 7, "b": 8}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("a\n\nb\n\na\n")
    model = Transformers(local_path=str(folder)).resolved()
    assert model.tokenizer is not None
    tokens = prepare_tokens(Local(path=str(text)), model.vocab_size, model.tokenizer)
    batch = tokens.batch(index=0, rank=0, world_size=1, batch_size=1, seq_len=6)
    assert batch.tolist() == [[7, 2, 8, 2, 7, 2]]
    with pytest.raises(ValueError, match=r"model.vocab_size: 8, must be at least 9"):
        prepare_tokens(Local(path=str(text)), 8, model.tokenizer)
