"""A Qwen3-MoE-shaped model under HarMoEny on one rank beside Transformers' own implementations of its experts.

All share one prefill batch and one decode step. The outputs are compared first: what computes something else is not
timed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import harmoeny
from harmoeny.models.base import DTYPES
from results_schema.printing import print_anything
from scripts.gpu_check.interleave import compare, interleave
from scripts.gpu_check.shapes import Measurement, Shape, parse_measurement

OURS = "harmoeny"
BASE = "grouped_mm"
THEIRS = ("eager", "batched_mm", BASE)
#: ``batched_mm`` gathers the weights of every assignment, which no device holds for a prefill.
_PREFILL_THEIRS = ("eager", BASE)
_PROMPT_TOKENS = 16
#: Largest difference of a logit, relative to the largest logit; rounding of BF16 adds up over the layers.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


def measure(asked: Measurement) -> dict[str, Any]:
    """Measure prefill and decode; phases by name, then implementations by name.

    Raises:
        ValueError: HarMoEny's logits are not those of Transformers.
    """
    shape, device = asked.shape, asked.device
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size, moe_intermediate_size=shape.intermediate_size, num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=max(1, shape.num_heads // 8), head_dim=shape.hidden_size // shape.num_heads,
        intermediate_size=shape.intermediate_size, vocab_size=4096, norm_topk_prob=True,
    )  # fmt: skip
    theirs, ours = (build(deepcopy(config), shape, device) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    prefill = torch.randint(config.vocab_size, shape.prefill, generator=generator).to(device)
    prompt = torch.randint(config.vocab_size, (shape.decode_sequences, _PROMPT_TOKENS + 1), generator=generator).to(
        device
    )
    found: dict[str, Any] = {}
    with harmoeny.attach(ours) as session:
        for phase, names, tokens in (("prefill", _PREFILL_THEIRS, prefill), ("decode", THEIRS, prompt)):
            step = _prefill if phase == "prefill" else _decode
            run_theirs, run_ours = step(theirs, tokens), step(session.model, tokens)
            actions = {name: _with_implementation(theirs, name, run_theirs) for name in names} | {OURS: run_ours}
            error = difference(run_ours(), actions[BASE]())
            if not error <= _TOLERANCE[shape.dtype]:
                raise ValueError(f"{phase}: logits differ by {error:.2g} of the largest one, {BASE} against {OURS}")
            found[phase] = {"error": error} | compare(interleave(actions, device, asked.rounds), BASE)
    return found


def build(config: Qwen3MoeConfig, shape: Shape, device: torch.device) -> Any:
    """Build the model with random weights, on its device from the beginning."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[shape.dtype])
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _with_implementation(model: Any, name: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run_with() -> Tensor:
        if model.config._experts_implementation != name:
            model.set_experts_implementation(name)
        return run()

    return run_with


def _prefill(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return logits

    return run


def _decode(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Return one step after a prompt; the cache forgets the step again."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = tokens[:, -1:]

    def run() -> Tensor:
        logits: Tensor = model(input_ids=last, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return run


def main() -> None:
    """Measure and write."""
    print_anything()
    asked = parse_measurement("scripts.gpu_check.model", __doc__)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that only newer ones have
    with torch.inference_mode():
        found = measure(asked)
    asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
