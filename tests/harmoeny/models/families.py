"""Every family of the installed Transformers that declares the experts interface: tiny models, and whether they pass.

``python -m tests.harmoeny.models.families --update`` writes the table of docs/models.md anew.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import harmoeny
from harmoeny.models.kit.experts_interface import find_experts

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
TOLERANCE = 1e-4
#: Without its experts a model's output has to change by more than this, relative to its scale, or nothing is proven.
MIN_EFFECT = 1e-2
#: A class with the interface's decorator, and perhaps others. Parsing the sources would take a second.
_DECLARED = re.compile(r"^@use_experts_implementation\b.*\n(?:[@ )].*\n)*class (\w+)", re.M)
#: Model classes above this size have parts that the sizes below do not reach.
_MAX_PARAMETERS = 10_000_000

#: Sizes by the names that configurations give them; a configuration takes those that it has.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "unpadded_vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_hidden_size": 16,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["sparse", "sparse"],
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "max_position_embeddings": 64,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: What single configurations need beside or in place of that, by model type.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    },
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Family:
    """One class of experts.

    Attributes:
        name: the folder of its model in Transformers.
        experts: the class's name.
    """

    name: str
    experts: str

    def __str__(self) -> str:
        return f"{self.name}-{self.experts}"


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    Attributes:
        layout: how its experts are laid out, in words.
        error: largest error relative to the output's scale; None where the family was refused.
        effect: the same, of leaving its experts out.
        shared_error: the error of a copy built without weights that was given this one's.
        num_calls: MoE layers that the engine executed.
        reason: why it was refused.
    """

    layout: str = ""
    error: float | None = None
    effect: float = 0.0
    shared_error: float = 0.0
    num_calls: int = 0
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Say it in a word or, where the family was refused, with the reason."""
        if self.error is None:
            return f"refused: {self.reason}"
        return "exact" if self.error <= TOLERANCE else "differs"


def families() -> list[Family]:
    """Read from the sources which classes declare the interface."""
    return list(_declared())


def _declared() -> Iterator[Family]:
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in _DECLARED.findall(path.read_text(encoding="utf-8")):
            yield Family(path.parent.name, name)


@cache
def outcome(family: Family) -> Outcome:
    """Run a family's tiny model unmodified, without experts, and with the engine behind its experts."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more are slower on matrices this small
    ALL_EXPERTS_FUNCTIONS.register("left_out", lambda _, hidden, *__: torch.zeros_like(hidden))
    model_class, config = _smallest(family)
    model = randomised(model_class(config))
    experts: Any = next(m for m in find_experts(model).values() if type(m).__name__ == family.experts)
    words = {
        "gated": experts.has_gate,
        "bias": experts.has_bias,
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "norm": getattr(experts, "has_post_expert_norm", False),
    }
    layout = ", ".join(word for word, has in words.items() if has) or "plain"
    wanted = run(model, "eager")
    left_out = run(model, "left_out")
    with torch.device("meta"):
        copy = model_class(config).eval()
    for own, given in zip(copy.modules(), model.modules(), strict=True):
        own._parameters.update(given._parameters)
        own._buffers.update(given._buffers)
    shared = run(copy, "eager")
    try:
        with harmoeny.attach(model, harmoeny.TokenHarMoEny(threshold=1)) as session:
            session.engine.recorder.enabled = True
            session.engine.recorder.begin_iteration()
            output = run(model)
            num_calls = len(session.engine.recorder.collect())
    except ValueError as error:
        return Outcome(layout, reason=str(error))
    return Outcome(
        layout,
        relative(output, wanted),
        effect=relative(left_out, wanted),
        shared_error=relative(shared, wanted),
        num_calls=num_calls,
    )


def randomised(model: Any, seed: int = 0) -> Any:
    """Move every weight off its initial value: many start as zeros or ones, which would hide what is done with them.

    Some families leave weights uninitialised, so no value is trusted, and the experts' are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {id(p) for experts in find_experts(model).values() for p in experts.parameters(recurse=False)}
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "bias" in n)]:
            if tensor.is_floating_point():
                if id(tensor) in drawn:
                    tensor.zero_()
                noise = torch.randn(tensor.shape, generator=generator) * (0.1 if id(tensor) in drawn else 0.05)
                tensor.copy_(tensor.nan_to_num(0, 0, 0).clamp(-2, 2) + noise)
    return model.eval()


def tiny_config(config_class: Any) -> Any:
    """Return a configuration of the smallest sizes."""
    values = {name: value for name, value in TINY.items() if hasattr(config_class, name)}
    return config_class(**values | SPECIAL.get(config_class.model_type, {}))


def run(model: Any, implementation: str | None = None, *, seed: int = 1, batch_size: int = 2) -> Tensor:
    """Return the output for two sequences, of which the second begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, TINY["unpadded_vocab_size"], (batch_size, 12), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[-1, :3] = 0
    inputs: dict[str, Tensor] = {"input_ids": input_ids.masked_fill(mask == 0, 0)}
    if model.config.model_type == "qwen3_omni_moe_talker_text":  # takes only embeddings
        inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids)}
    if model.config.model_type == "ernie4_5_vl_moe_text":  # has other experts for image tokens
        inputs["moe_mm_token_type_ids"] = (input_ids > 40).int()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        output = model(**inputs, attention_mask=mask, use_cache=False)
    result: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return result


def relative(output: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest value wanted."""
    return float((output - wanted).abs().max() / wanted.abs().max())


def _smallest(family: Family) -> tuple[Callable[[Any], nn.Module], Any]:
    """Find the model class of a family that holds its experts and not much more, and its tiny configuration."""
    module = importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")
    classes: list[Any] = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__ and "PreTrained" not in cls.__name__
    ]
    order = ("ForCausalLM", "TextModel", "Model", "")
    classes.sort(key=lambda cls: next(i for i, end in enumerate(order) if cls.__name__.endswith(end)))
    problems = []
    for cls in classes:
        try:
            config = tiny_config(cls.config_class)
            with torch.device("meta"):
                model = cls(config)
        except Exception as error:  # noqa: BLE001  (any class that these sizes do not suit is passed over)
            problems.append(f"{cls.__name__}: {error!r}")
            continue
        if sum(p.numel() for p in model.parameters()) <= _MAX_PARAMETERS and any(
            type(m).__name__ == family.experts for m in model.modules()
        ):
            return cls, config
    raise LookupError(f"{family}: no small model found; {problems}")


def table() -> str:
    """Return the table of all families for docs/models.md."""
    rows = ["| Family | Experts | Layout | Result |", "|---|---|---|---|"]
    for family in families():
        result = outcome(family)
        rows.append(f"| {family.name} | `{family.experts}` | {result.layout} | {result.verdict} |")
    return "\n".join(rows)


def section() -> str:
    """Return the generated part of docs/models.md."""
    return f"Transformers {transformers.__version__}:\n\n{table()}\n"


def committed() -> tuple[str, str, str]:
    """Return docs/models.md in three parts, the middle one being :func:`section`."""
    begin, end = "<!-- families: begin -->\n", "<!-- families: end -->"
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(begin)
    middle, _, after = rest.partition(end)
    return before + begin, middle, end + after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try every family, and print the table of docs/models.md.")
    parser.add_argument("--update", action="store_true", help="write it into the page instead")
    if parser.parse_args().update:
        start, _, rest = committed()
        DOCUMENT.write_text(start + section() + rest, encoding="utf-8")
    else:
        print(section())
