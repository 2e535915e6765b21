"""Models of Transformers from folders, from the local hub cache or from configurations; never from the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmoeny.models.kit.quiet import quiet
from harmoeny.models.kit.saved_weights import check_weights, refuse_unfit, weight_files

#: What configurations call the number of experts and the experts per token.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def find_folder(hub_name: str | None, local_path: str | None) -> Path:
    """Return the folder that holds a model's files.

    Raises:
        ValueError: it isn't there, neither under ``local_path`` nor in the hub's cache on this machine.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    way_out = "download it elsewhere and set model.local_path=FOLDER, or set model.random_weights=true"
    if local_path is not None:
        folder = Path(local_path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"model.local_path: {local_path!r}, must be a folder with a saved model; {way_out}")
        return folder
    if hub_name is None:
        raise ValueError("model.local_path: null, must be a folder with a saved model")
    try:
        return Path(snapshot_download(hub_name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"model.hub_name: {hub_name!r} is not in this machine's hub cache, and nothing is downloaded; {way_out}"
        ) from error


def load_config(folder: Path, *, weights: bool = True) -> Any:
    """Read a saved model's configuration.

    Args:
        folder: holds ``config.json``.
        weights: insist that there are weights too.

    Raises:
        ValueError: there is no usable configuration, or a file of the weights isn't there.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"model.local_path: {str(folder)!r} has no readable config.json ({error})") from error
    if weights:
        weight_files(folder)
    if "quantization_config" in values:
        raise ValueError(f"model.local_path: {str(folder)!r} is quantised, must be float32 or bfloat16 weights")
    return config_from(values, f"model.local_path: {str(folder)!r}")


def config_from(values: Mapping[str, Any], source: str) -> Any:
    """Make a configuration of Transformers.

    Args:
        values: as in ``config.json``.
        source: begins error messages.

    Raises:
        ValueError: the installed Transformers has no such model, or refuses the values.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{source}: model_type {model_type!r}, must be one that Transformers {transformers.__version__} has itself "
            "(code from model repositories is never run)"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict({k: v for k, v in values.items() if k != "auto_map"})
    except Exception as error:  # Transformers and its parts raise all kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: Transformers refuses the configuration ({reason})") from error


def limit_layers(config: Any, num_layers: int) -> None:
    """Keep a configuration's first layers.

    Raises:
        ValueError: it has fewer.
    """
    text = config.get_text_config()
    total = text.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"model.num_layers: {num_layers}, must be 1 to {total}, the layers of the model")
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:  # one entry per layer, as layer_types
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    if config.model_type == "switch_transformers":
        config.num_decoder_layers = num_layers
        config.num_sparse_encoder_layers = num_layers // config.encoder_sparse_step
        config.num_sparse_decoder_layers = num_layers // config.decoder_sparse_step


def num_experts_of(config: Any) -> int:
    """Return the number of experts per MoE layer.

    Raises:
        ValueError: the configuration names none.
    """
    return _first(config, _NUM_EXPERTS, "experts")


def top_k_of(config: Any) -> int:
    """Return the number of experts per token.

    Raises:
        ValueError: the configuration names none.
    """
    return 1 if config.model_type == "switch_transformers" else _first(config, _TOP_K, "experts per token")


def _first(config: Any, names: tuple[str, ...], what: str) -> int:
    text = config.get_text_config()
    value = next((getattr(text, name) for name in names if getattr(text, name, None) is not None), None)
    if not isinstance(value, int):
        raise ValueError(f"model: a {config.model_type} configuration does not say its number of {what}")
    return value


def build_module(config: Any, folder: Path | None, dtype: torch.dtype, *, seed: int = 0, on_meta: bool) -> Any:
    """Build a model for inference.

    Args:
        config: its configuration.
        folder: holds its weights; None draws them.
        dtype: of the weights.
        seed: of the weights if they are drawn.
        on_meta: build it without weights, which another rank of the host shares.

    Returns:
        The model: with a language head where Transformers has one for it.

    Raises:
        ValueError: the files lack weights that the model needs, or hold them in other shapes.
    """
    auto = _class_of(config)
    with quiet():
        if on_meta:
            with torch.device("meta"):
                return _ready(auto.from_config(config, dtype=dtype))
        if folder is None:
            torch.manual_seed(seed)
            return _ready(auto.from_config(config, dtype=dtype))
        module, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    refuse_unfit(folder, config, info)
    return _ready(module)


def check_saved(config: Any, folder: Path) -> None:
    """Check a folder's weights, as far as that goes without reading them.

    Raises:
        ValueError: a file, what is wrong with it, and what helps.
    """
    auto = _class_of(config)
    check_weights(folder, config, auto._model_mapping[type(config)])


def is_supported(config: Any) -> bool:
    """Tell whether a configuration is of a decoder with a language head, or of Switch."""
    from transformers import AutoModelForCausalLM, SwitchTransformersConfig

    decoders = AutoModelForCausalLM._model_mapping
    # Whatever the first look misses is in the list of all, whose configurations take a second to import.
    return type(config) is SwitchTransformersConfig or type(config) in decoders or type(config) in decoders.keys()  # noqa: SIM118


def _class_of(config: Any) -> Any:
    """Return the class that builds a model: with a language head where Transformers has one for it."""
    import transformers

    classes = (getattr(transformers, name) for name in _AUTO_CLASSES)
    return next(auto for auto in classes if type(config) in auto._model_mapping)


def _ready(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(requires_grad=False)
