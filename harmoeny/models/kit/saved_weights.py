"""Checks a saved model's weights before anything loads them: the files, and that they fit config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harmoeny.models.kit.quiet import quiet

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_START = b"version https://git-lfs.github.com/"
_AGAIN = "download it again"
#: How the types of numbers begin that mean something only together with scales.
_QUANTISED = ("I8", "U8", "I4", "U4", "F8", "F4", "F6")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
#: What was found fit: a sweep asks for the same model many times.
_FIT: set[tuple[Any, str]] = set()


def check_weights(folder: Path, config: Any, model_class: Any) -> None:
    """Refuse weights that a model could not be loaded from; nothing but names and shapes is read.

    Args:
        folder: of the model.
        config: what is to be built of it.
        model_class: Transformers' class of it.

    Raises:
        ValueError: a file, what is wrong with it, and what helps.
    """
    files = weight_files(folder)
    state = tuple((path, (status := path.stat()).st_size, status.st_mtime_ns) for path in files)
    key = (state, config.to_json_string())
    if key in _FIT:
        return
    shapes: dict[str, list[int]] = {}
    file_of: dict[str, Path] = {}
    for path in files:
        found = _shapes_in(path)
        shapes |= found
        file_of |= dict.fromkeys(found, path)
    _refuse_unlike_experts(shapes, file_of)
    info = _load_without_content(config, model_class, shapes)
    if info is not None:
        refuse_unfit(folder, config, info, file_of)
    _FIT.add(key)


def refuse_unfit(folder: Path, config: Any, info: Mapping[str, Any], file_of: Mapping[str, Path] | None = None) -> None:
    """Refuse weights of which Transformers said that some are missing or of another shape.

    Args:
        folder: of the model.
        config: what was built of it.
        info: what ``from_pretrained`` returned as its loading info.
        file_of: the file of every tensor.

    Raises:
        ValueError: there are such weights; the first is named.
    """
    start = f"model.local_path: {str(folder)!r}"
    remedy = "config.json and weights must be of the same model"
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        layer = name.rpartition(".")[0] + "."
        file = next((path.name for key, path in (file_of or {}).items() if key == name or key.startswith(layer)), None)
        raise ValueError(
            f"{start} has other weights than its config.json describes: {name} is {list(found)}"
            f"{f' in {file}' if file else ''}, must be {list(wanted)}; {remedy}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{start} lacks {len(missing)} weights that a {config.model_type} needs, {missing[0]} first; {remedy}"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a saved model's weights.

    Raises:
        ValueError: there are none, or one that the index names isn't there.
    """
    start = f"model.local_path: {str(folder)!r}"
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{start} has no *.safetensors, the only kind of weights that is read (save_pretrained writes it)"
        )
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        raise ValueError(f"{start} has neither {_SINGLE} nor {_INDEX}, one of which must name all weights")
    _refuse_pointer(index)
    try:
        names = sorted({os.fspath(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.local_path: {str(index)!r} is damaged ({error!r}); {_AGAIN}") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{start} lacks {absent[0]}{f' and {len(absent) - 1} more' if len(absent) > 1 else ''} of the {len(names)} "
            f"files that {_INDEX} names; download what is missing"
        )
    return [folder / name for name in names]


def _shapes_in(path: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a file by their names."""
    from safetensors import SafetensorError, safe_open

    _refuse_pointer(path)
    try:
        with safe_open(str(path), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            for name, tensor in slices.items():
                if tensor.get_dtype().startswith(_QUANTISED):
                    raise ValueError(
                        f"model.local_path: {str(path)!r} is quantised: {name} is {tensor.get_dtype()}, must be "
                        "float32 or bfloat16 weights"
                    )
            return {name: tensor.get_shape() for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model.local_path: {str(path)!r} is torn or no safetensors file ({reason}; {path.stat().st_size} bytes); "
            f"{_AGAIN}"
        ) from error


def _refuse_unlike_experts(shapes: Mapping[str, list[int]], file_of: Mapping[str, Path]) -> None:
    """Refuse experts of a layer that are not of one shape: Transformers could not put them together."""
    firsts: dict[str, str] = {}
    for name, shape in shapes.items():
        first = firsts.setdefault(_EXPERT.sub("experts.*.", name), name)
        if shape != shapes[first]:
            raise ValueError(
                f"model.local_path: {str(file_of[name])!r} has experts of different shapes: {name} is {list(shape)}, "
                f"{first} is {list(shapes[first])}; {_AGAIN}"
            )


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_START)) == _LFS_START:
            raise ValueError(
                f"model.local_path: {str(path)!r} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
            )


def _load_without_content(config: Any, model_class: Any, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
    """Let Transformers load tensors without content, with all its conversions, and return its loading info.

    None where it cannot do so: then loading itself will tell.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with quiet(), _in_one_thread(), FakeTensorMode():
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict={name: torch.empty(shape) for name, shape in shapes.items()},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception:  # noqa: BLE001  (whatever it meets there is no reason to refuse a model)
        return None
    return dict(info)


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Let Transformers load in this thread: tensors without content belong to one."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
