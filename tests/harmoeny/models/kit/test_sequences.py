"""Sequences of different lengths in one batch compute what each computes alone, without keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harmoeny.models.kit.sequences import RunningSequences, only_keys_and_values
from harmoeny.models.transformers import Transformers, TransformersModel

#: The families differ in how they keep keys and values: one tensor head per key, or latent ones.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": None,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1},
}  # fmt: skip


def build(family: str) -> TransformersModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Transformers(random_weights=True, architecture={"model_type": family, **sizes, **FAMILIES[family]})
    model = config.build(seed=1)
    assert isinstance(model, TransformersModel)
    model.context.dense = True
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_joining_and_leaving_changes_nobodys_logits(family: str) -> None:
    model, running = build(family), RunningSequences()
    assert model.serves
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(64, (1, 12), generator=generator) for _ in range(4)]
    lengths: dict[int, int] = {}

    def alone(index: int) -> Tensor:
        model.context.tape.pin(None)
        return model.forward(texts[index][:, : lengths[index]])

    def join(*indices: int) -> None:
        model.context.tape.pin(None)
        logits, cache = model.prefill(torch.cat([texts[i][:, :5] for i in indices]))
        running.add(cache, len(indices), 5)
        lengths.update(dict.fromkeys(indices, 5))
        for row, index in enumerate(indices):
            torch.testing.assert_close(logits[row : row + 1], alone(index), atol=1e-5, rtol=1e-4)

    def step() -> None:
        tokens = torch.stack([texts[i][0, length] for i, length in lengths.items()])
        model.context.tape.pin(None)
        logits = model.decode_running(tokens, running)
        for row, index in enumerate(lengths):
            lengths[index] += 1
            torch.testing.assert_close(logits[row : row + 1], alone(index), atol=1e-5, rtol=1e-4)

    def leave(index: int) -> None:
        running.keep([row for row, other in enumerate(lengths) if other != index])
        del lengths[index]

    with torch.inference_mode():
        join(0, 1)
        step()
        step()
        join(2)
        step()
        leave(0)
        join(3)
        step()
        leave(1)  # the longest: nobody needs its padding any more
        step()
        assert running.cache.get_seq_length() == max(lengths.values())
        leave(2)
        leave(3)
        assert running.cache is None
        join(0)
        step()


def test_windows_and_states_are_more_than_keys_and_values() -> None:
    assert only_keys_and_values(build("qwen3_moe").module.config)
    windowed: Any = build("mixtral").module.config
    windowed.sliding_window = 4
    windowed.layer_types = ["sliding_attention", "full_attention"]
    assert not only_keys_and_values(windowed)
