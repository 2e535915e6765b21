"""Models of Transformers: any decoder whose experts use its experts interface, and Switch; saved, or drawn."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from harmoeny.models.base import DTYPES, ModelConfig, MoEModel, TokenizerFile
from harmoeny.models.kit.experts_interface import AdaptedExperts, find_experts
from harmoeny.models.kit.fingerprint import folder_fingerprint
from harmoeny.models.kit.loading import (
    build_module,
    check_saved,
    config_from,
    find_folder,
    is_supported,
    limit_layers,
    load_config,
    num_experts_of,
    top_k_of,
)
from harmoeny.models.kit.sequences import RunningSequences, only_keys_and_values
from harmoeny.models.switch import SwitchModel, is_switch


class TransformersModel(MoEModel):
    """A decoder with expert-parallel MoE layers; a forward pass is a prefill, as far as the first token's logits."""

    decodes: ClassVar[bool] = True

    def __init__(self, module: Any, top_k: int, *, route_shared: bool = False) -> None:
        super().__init__(AdaptedExperts(module, route_shared=route_shared), top_k)
        # Logits of the whole prompt would be a large matrix product that no prefill needs.
        one_token = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._options = {"logits_to_keep": 1} if one_token else {}
        # Newer releases of Transformers call it `cache`, and warn of the older name.
        self._cache = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the first output token's logits, ``[batch_size, vocab_size]``."""
        logits: Tensor = self.module(input_ids=input_ids, use_cache=False, **self._options).logits
        return logits[:, -1]

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Compute the first output token's logits and keep keys and values."""
        output = self.module(input_ids=input_ids, use_cache=True, **self._options)
        return output.logits[:, -1], output[self._cache]

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Compute the next token's logits with the keys and values of all before."""
        output = self.module(input_ids=tokens[:, None], use_cache=True, **{self._cache: cache}, **self._options)
        logits: Tensor = output.logits
        return logits[:, -1]

    @property
    def serves(self) -> bool:
        """Whether sequences of different lengths can be computed together."""
        return only_keys_and_values(self.module.config)

    def decode_running(self, tokens: Tensor, running: RunningSequences) -> Tensor:
        """Compute the next token's logits of sequences of different lengths."""
        inputs = running.next_inputs(tokens.device)
        output = self.module(
            input_ids=tokens[:, None], use_cache=True, **inputs, **{self._cache: running.cache}, **self._options
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def layer_tokens(self, batch_size: int, seq_len: int) -> list[int]:
        """Return the tokens per MoE layer: all of them."""
        return [batch_size * seq_len] * len(self.experts)


@cache
def _experts_per_layer(config: str) -> set[int]:
    """Return the numbers of experts that a decoder's layers have; a sweep asks for the same model many times."""
    module = build_module(config_from(json.loads(config), "model"), None, torch.float32, on_meta=True)
    return {layer.num_experts for layer in AdaptedExperts(module).experts}


@cache
def _num_shared(config: str) -> int:
    """Return how many shared experts of the routed ones' width a decoder's layers hand over."""
    module = build_module(config_from(json.loads(config), "model"), None, torch.float32, on_meta=True)
    present = {layer.num_shared for layer in AdaptedExperts(module, route_shared=True).experts}
    if len(present) > 1:
        raise ValueError(f"model.route_shared: true, must be false for layers with {sorted(present)} shared experts")
    return present.pop()


@cache
def _first_moe_layer(config: str) -> int:
    """Return the index of a decoder's first layer with experts; 0 where the names of its layers do not tell."""
    module = build_module(config_from(json.loads(config), "model"), None, torch.float32, on_meta=True)
    indices = [int(found[1]) for path in find_experts(module) if (found := re.search(r"layers\.(\d+)\.", path))]
    return min(indices, default=0)


def _first_switch_layer(config: Any) -> int:
    """Return the index of the first sparse layer of Switch's encoder or decoder."""
    return 0 if 1 in (config.encoder_sparse_step, config.decoder_sparse_step) else 1


@dataclass(kw_only=True)
class Transformers(ModelConfig):
    """A model of Transformers; docs/models.md lists the families.

    Attributes:
        hub_name: its name on the hub, looked up in this machine's cache; nothing is downloaded.
        local_path: a folder with ``config.json`` and, unless ``random_weights``, ``*.safetensors``; goes before
            ``hub_name``.
        random_weights: draw the weights, from the seed, so that none have to be there.
        num_layers: keep only the first so many layers; null keeps all.
        architecture: the values of ``config.json``, which ``random_weights`` uses where there is no ``local_path``.
        num_experts: 0: as the model has; no other number than the model's is accepted. So too for the next two.
        top_k: experts per token.
        vocab_size: tokens.
        route_shared: hand the model's shared expert to the runtime, as one more expert that every rank holds and every
            token goes to, in place of computing it in the model's own code.
    """

    name: ClassVar[str] = "transformers"
    description: ClassVar[str] = "a saved model of Transformers, any family with experts: model.local_path=FOLDER"

    hub_name: str | None = None
    local_path: str | None = None
    random_weights: bool = False
    num_layers: int | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    num_experts: int = 0
    top_k: int = 0
    vocab_size: int = 0
    route_shared: bool = False

    @property
    def num_shared(self) -> int:
        """As many as its width is that of routed ones; 0 where the model's own code computes it."""
        return _num_shared(self._config().to_json_string()) if self.route_shared else 0

    def resolved(self) -> Self:
        """Return the configuration with the model's sizes.

        Raises:
            ValueError: the model isn't there, its sizes are none, or another size was asked for.
        """
        config = self._config()
        sizes: dict[str, Any] = {
            "num_experts": num_experts_of(config),
            "top_k": top_k_of(config),
            "vocab_size": int(config.get_text_config().vocab_size),
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"model: its configuration says {name} {size}, must be at least 1")
            if getattr(self, name) not in (0, size):
                raise ValueError(f"model.{name}: {getattr(self, name)}, must be 0 or {size}, which the model has")
        return replace(self, **sizes)

    def validate(self) -> None:
        """Check the configuration, and that the model's layers are what the runtime can execute.

        Raises:
            ValueError: a field, its value and what is allowed.
        """
        from transformers import SwitchTransformersConfig

        resolved = self.resolved()
        super(Transformers, resolved).validate()
        config = self._config()
        if isinstance(config, SwitchTransformersConfig):
            if self.route_shared:
                raise ValueError("model.route_shared: true, must be false for Switch, which has no shared expert")
            self._check_depth(_first_switch_layer(config))  # all its sparse layers are alike
        else:
            whole = replace(self, num_layers=None)._config()
            self._check_depth(_first_moe_layer(whole.to_json_string()))
            present = _experts_per_layer(config.to_json_string())
            if present != {resolved.num_experts}:
                raise ValueError(f"model: layers with {sorted(present)} experts, must be {resolved.num_experts} in all")
            _ = self.num_shared  # refuses what cannot be handed over
        if not self.random_weights:
            check_saved(config, find_folder(self.hub_name, self.local_path))

    def _check_depth(self, first: int) -> None:
        """Refuse to cut every layer with experts away; ``first``: the index of the first one."""
        if self.num_layers is not None and self.num_layers <= first:
            raise ValueError(
                f"model.num_layers: {self.num_layers}, must be at least {first + 1}: the model's layers before that "
                "have no experts"
            )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model has positions for; None where nothing limits it."""
        limit = getattr(self._config().get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def tokenizer(self) -> TokenizerFile | None:
        """The model's own tokenizer, if its folder has a ``tokenizer.json``.

        Raises:
            ValueError: the model's configuration does not say which token ends a document.
        """
        if self._drawn:
            return None
        path = find_folder(self.hub_name, self.local_path) / "tokenizer.json"
        if not path.is_file():
            return None
        end = self._config().get_text_config().eos_token_id
        end_id = end[0] if isinstance(end, list) and end else end
        if not isinstance(end_id, int):
            raise ValueError(
                f"model.local_path: {str(path.parent)!r} has a tokenizer, but no eos_token_id in config.json"
            )
        return TokenizerFile(path, end_id)

    def fingerprint(self) -> str:
        """Digest the folder's configuration, tokenizer and, unless they are drawn, weights."""
        if self._drawn:
            return ""
        return folder_fingerprint(find_folder(self.hub_name, self.local_path), weights=not self.random_weights)

    def build(self, seed: int, device: str = "cpu") -> MoEModel:
        """Load the model, or draw its weights."""
        config = self._config()
        folder = None if self.random_weights else find_folder(self.hub_name, self.local_path)
        module = build_module(config, folder, DTYPES[self.dtype], seed=seed, on_meta=device == "meta")
        if is_switch(module):
            return SwitchModel(module)
        return TransformersModel(module, top_k_of(config), route_shared=self.route_shared)

    @property
    def _drawn(self) -> bool:
        """Whether nothing of the model is read from files."""
        return self.random_weights and self.local_path is None and bool(self.architecture)

    def _config(self) -> Any:
        if self._drawn:
            config = config_from(self.architecture, "model.architecture")
        else:
            folder = find_folder(self.hub_name, self.local_path)
            config = load_config(folder, weights=not self.random_weights)
        if not is_supported(config):
            raise ValueError(f"model: {config.model_type}, must be a decoder with a language head, or Switch")
        if self.num_layers is not None:
            limit_layers(config, self.num_layers)
        return config
