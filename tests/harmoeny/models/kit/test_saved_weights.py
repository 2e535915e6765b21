"""Weights that cannot be loaded are refused before ranks start, with the file and what helps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from harmoeny.models.transformers import Transformers
from tests.conftest import Load
from tests.harmoeny.models.saved import PROMISED, save
from tests.harmoeny.models.test_transformers import change_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, whole and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    save("qwen3_moe", folder)
    AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe").save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.fixture
def whole(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "qwen3_moe", tmp_path / "whole"))


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


def refused(folder: Path, *words: str, **options: Any) -> None:
    """Expect a refusal, in one line that starts with the field and holds all ``words``."""
    with pytest.raises(ValueError, match=r"\Amodel\.") as error:
        Transformers(local_path=str(folder), **options).validate()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.many
@pytest.mark.parametrize("name", PROMISED)
def test_every_family_is_accepted_as_it_was_saved(name: str, tmp_path: Path) -> None:
    Transformers(local_path=str(save(name, tmp_path))).validate()


def test_shards_are_accepted(shards: Path) -> None:
    assert len(list(shards.glob("*.safetensors"))) > 2
    Transformers(local_path=str(shards)).validate()


def test_a_pointer_is_named_with_what_fetches_the_file(whole: Path, shards: Path) -> None:
    (whole / "model.safetensors").write_text(POINTER)
    refused(whole, str(whole / "model.safetensors"), "Git LFS pointer", "git lfs pull")
    second = sorted(shards.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_text(POINTER)
    refused(shards, str(second), "git lfs pull")
    second.write_bytes(content)
    (shards / INDEX).write_text(POINTER)
    refused(shards, INDEX, "git lfs pull")


@pytest.mark.parametrize("size", [0, 5, 300, 20_000, -1])
def test_a_torn_file_is_named(whole: Path, size: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(whole, str(path), "torn", f"{path.stat().st_size} bytes", "download it again")


def test_another_file_in_its_place_is_named(whole: Path) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(b"<html>404</html>" * 100)
    refused(whole, str(path), "no safetensors file")


def _edit(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change the tensor of a file whose name ends so."""
    tensors = load_file(path)
    found = next(key for key in tensors if key.endswith(name))
    save_file(tensors | {found: change(tensors[found]).contiguous()}, path, metadata={"format": "pt"})


def test_one_expert_of_another_shape_is_named(whole: Path) -> None:
    _edit(whole / "model.safetensors", "experts.1.up_proj.weight", lambda w: w.flatten())
    refused(whole, "model.safetensors", "experts.1.up_proj.weight", "different shapes")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_mean_nothing_without_scales_are_refused(whole: Path, dtype: torch.dtype) -> None:
    _edit(whole / "model.safetensors", "experts.1.up_proj.weight", lambda w: w.to(dtype))
    refused(whole, "model.safetensors", "is quantised", "experts.1.up_proj.weight")


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"\xff\xfe\x00", b'{"model_type": "qwen3_moe", "hidden_size": "16"}']
)
def test_a_damaged_configuration_is_refused(whole: Path, content: bytes) -> None:
    (whole / "config.json").write_bytes(content)
    refused(whole, "config")


def test_a_folder_or_a_number_in_place_of_a_file_is_refused(whole: Path, shards: Path) -> None:
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors").mkdir()
    refused(whole, "has neither model.safetensors nor")
    (shards / INDEX).write_text('{"weight_map": {"a": 3}}')
    refused(shards, INDEX, "damaged")


def test_a_missing_shard_is_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    second.unlink()
    refused(shards, f"lacks {second.name} of the", INDEX)
    first.unlink()
    refused(shards, f"lacks {first.name} and 1 more of the", INDEX)


def test_shards_without_a_usable_index_are_refused(shards: Path) -> None:
    for damaged in ("", "{", "[]", '{"weight_map": 3}', "{}"):
        (shards / INDEX).write_text(damaged)
        refused(shards, INDEX, "damaged", "download it again")
    (shards / INDEX).unlink()
    refused(shards, "neither model.safetensors nor", INDEX)


def test_a_shard_that_lacks_a_tensor_is_refused(shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name, _ = tensors.popitem()
    save_file(tensors or {"nothing": torch.zeros(1)}, path, metadata={"format": "pt"})
    refused(shards, "lacks 1 weights that a qwen3_moe needs", name.rpartition(".")[0].partition(".experts.")[0])


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": 12},
        {"num_local_experts": 12},
        {"hidden_size": 48},
        {"moe_intermediate_size": 40},
        {"vocab_size": 90},
    ],
)
def test_other_shapes_are_refused_with_both(whole: Path, values: dict[str, int]) -> None:
    config = json.loads((whole / "config.json").read_text())
    if not set(values) <= set(config):
        pytest.skip("this Transformers has another name for it")
    change_config(whole, **values)
    with pytest.raises(
        ValueError,
        match=r"other weights than its config.json describes: \S+ is \[[\d, ]+\] in model.safet.*, must be \[",
    ):
        Transformers(local_path=str(whole)).validate()
    with pytest.raises(ValueError, match=r"other weights than its config.json describes"):
        Transformers(local_path=str(whole)).build(0)


def test_a_model_of_fewer_layers_than_the_configuration_is_refused(whole: Path) -> None:
    change_config(whole, num_hidden_layers=3, layer_types=None)
    refused(whole, "weights that a qwen3_moe needs, model.layers.2.")
    Transformers(local_path=str(whole), num_layers=2).validate()


def test_drawn_weights_need_no_files(whole: Path) -> None:
    (whole / "model.safetensors").write_text(POINTER)
    Transformers(local_path=str(whole), random_weights=True).validate()


def test_files_that_were_fetched_meanwhile_are_looked_at_again(whole: Path) -> None:
    path = whole / "model.safetensors"
    content = path.read_bytes()
    path.write_text(POINTER)
    refused(whole, "pointer")
    path.write_bytes(content)
    Transformers(local_path=str(whole)).validate()
    path.write_bytes(content[:-7])
    refused(whole, "torn")


class TestDepth:
    """``model.num_layers``, where the first layers of a model have no experts."""

    DEEPSEEK: ClassVar[dict[str, Any]] = {
        "model_type": "deepseek_v3", "num_hidden_layers": 5, "first_k_dense_replace": 3, "hidden_size": 32,
        "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_group": 1, "topk_group": 1, "vocab_size": 300,
    }  # fmt: skip

    @pytest.mark.parametrize("num_layers", [1, 3])
    def test_all_layers_with_experts_cut_away(self, num_layers: int) -> None:
        model = Transformers(architecture=self.DEEPSEEK, random_weights=True, num_layers=num_layers)
        with pytest.raises(
            ValueError, match=re.escape(f"model.num_layers: {num_layers}, must be at least 4: the model's")
        ):
            model.validate()

    def test_one_left(self) -> None:
        Transformers(architecture=self.DEEPSEEK, random_weights=True, num_layers=4).validate()

    def test_switch(self) -> None:
        sizes = {
            "model_type": "switch_transformers", "num_layers": 4, "num_decoder_layers": 4, "d_model": 32, "d_ff": 48,
            "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4, "vocab_size": 300,
            "decoder_start_token_id": 0,
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"model.num_layers: 1, must be at least 2"):
            Transformers(architecture=sizes, random_weights=True, num_layers=1).validate()
        model = Transformers(architecture=sizes, random_weights=True, num_layers=2)
        model.validate()
        assert len(model.build(0, "meta").experts) == 2


def test_a_sequence_longer_than_the_models_positions_is_refused(whole: Path, load: Load) -> None:
    change_config(whole, max_position_embeddings=64, vocab_size=300)
    common = (
        "model=transformers",
        f"model.local_path={whole}",
        "model.random_weights=true",
        "router=model",
        "device=cpu",
    )
    load(*common, "seq_len=64")
    with pytest.raises(ValueError, match=r"\Aseq_len: 65, must be at most 64, the positions of the model"):
        load(*common, "seq_len=65")
    load(*common, "seq_len=60", "decode_tokens=4")
    with pytest.raises(ValueError, match=r"\Aseq_len \+ decode_tokens: 65, must be at most 64"):
        load(*common, "seq_len=60", "decode_tokens=5")
