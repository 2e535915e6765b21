"""Tiny models on disk, one per family that docs/models.md promises."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from tests.harmoeny.models.families import randomised, run, tiny_config

DECODERS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe")
PROMISED = ("switch_transformers", *DECODERS)


def save(name: str, folder: Path, **sizes: int) -> Path:
    """Build a family's tiny model and save it; returns where. ``sizes``: what its config has otherwise."""
    if name == "switch_transformers":
        widths = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_experts": 6}
        layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
        config = SwitchTransformersConfig(
            **(widths | sizes), **layers, num_sparse_decoder_layers=1, decoder_start_token_id=0
        )
        model: Any = SwitchTransformersForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    else:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        cls = next(c for n, c in vars(module).items() if n.endswith("ForCausalLM"))
        config = tiny_config(cls.config_class)
        config.update(sizes)
        model = randomised(cls(config))
    model.save_pretrained(folder / name)
    return folder / name


def unmodified(folder: Path) -> Any:
    """Load a saved model the way anybody would."""
    auto = AutoModelForSeq2SeqLM if folder.name == "switch_transformers" else AutoModelForCausalLM
    options = {} if folder.name == "switch_transformers" else {"experts_implementation": "eager"}
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model: Any, *, seed: int = 1, batch_size: int = 2) -> Tensor:
    """Return the logits of a batch with padding."""
    if model.config.model_type != "switch_transformers":
        return run(model, seed=seed, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 96, (batch_size, 12), generator=generator)
    input_ids[-1, 9:] = 0
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=(input_ids > 0).int(), decoder_input_ids=input_ids[:, :4])
    result: Tensor = output.logits
    return result
