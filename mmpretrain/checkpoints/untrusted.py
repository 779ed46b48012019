"""Restrictions on a configuration that came with a checkpoint: classes, files and sizes (see SECURITY.md)."""

import importlib
import inspect
import os
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mmpretrain.config import instantiate
from mmpretrain.data.source import SampleSource
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel

MODELS, TOKENIZERS, SOURCES = "mmpretrain.models", "mmpretrain.data.tokenizer", "mmpretrain.data"
SOURCE_MEMBERS = ("num_samples", "fingerprint", "key", "location", "read")
TOKENIZER_FOLDER = "tokenizer"
"""Folder in a run's directory with a copy of the local tokenizer that it was trained with."""
_TIMM_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_TOKENIZER_BYTES = 256 << 20
_ELSEWHERE = re.compile(r"[/\\:~]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def lookup(home: str, trust: Sequence[str], members: Sequence[str] = ()) -> instantiate.Lookup:
    """Return a lookup of the `_target_`s that a checkpoint's configuration may name: parts of `home` and trusted modules.

    Parts of `home` must have the attributes `members`.

    A part is a class defined in the module, or a function defined there whose return annotation is `ImageTextModel`,
    `Tokenizer` or `SampleSource`. Names that the module only imports (such as `os.system`) and other functions are refused.
    """

    def find(target: Any, path: str) -> Any:
        module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
        part = None
        if all(word.isidentifier() for word in [*module.split("."), name]) and any(
            module == known or module.startswith(f"{known}.") for known in (home, *trust)
        ):
            part = _part(module, name)
        is_trusted = any(module == known or module.startswith(f"{known}.") for known in trust)
        if part is None or not (is_trusted or all(hasattr(part, member) for member in members)):
            raise ValueError(
                f"config.yaml: {path}._target_ is {target!r}, which came with the checkpoint and is no part of "
                f"mmpretrain that belongs there; if you know that code, name its module: trust=[{module}]"
            )
        return part

    return find


def _part(module: str, name: str) -> Any:
    try:
        part = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    if getattr(part, "__module__", None) != module:
        return None
    made = typing.get_type_hints(part).get("return") if inspect.isfunction(part) else part
    return (
        part if made in (ImageTextModel, Tokenizer, SampleSource) or (made is part and isinstance(part, type)) else None
    )


def without_weights(node: Any) -> Any:
    """Remove the arguments that make timm read or download weights, which the checkpoint already has."""
    if isinstance(node, list):
        return [without_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: without_weights(value) for key, value in node.items() if key not in _TIMM_WEIGHTS}


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (full name, value) of all values in nested containers, except `_target_`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "_target_":
                yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, node


def check_text(value: Any, path: str) -> None:
    """Raises: ValueError for an interpolation, which could read values of this process such as its environment."""
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{path} is {value!r}, an interpolation, which a checkpoint's file may not have; replace it in the file, or "
            "give the value on the command line where there is a key for it"
        )


def check_model(node: Any, largest: int, trust: Sequence[str]) -> None:
    """Raises: ValueError if a value of a model's node refers to other files or is larger than the number of its weights."""
    for path, value in leaves(node, "config.yaml: model"):
        check_text(value, path)
        is_hub_name = path.endswith((".hf_model_name", ".hf_tokenizer_name"))
        if isinstance(value, str) and value not in trust and (is_hub_name or _ELSEWHERE.search(value)):
            raise ValueError(
                f"{path} is {value!r}, which leads to files elsewhere; if you know them, name it: trust=[{value!r}]"
            )
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{path} is {value}; expected at most {largest}, given the size of its weights")


def with_own_files(node: Any, folder: Path) -> dict[str, Any]:
    """Point a tokenizer's node to the copies in the run's directory, if there are any.

    Raises: ValueError if the node is not a dictionary.
    """
    if not isinstance(node, dict):
        raise ValueError(f"config.yaml: data.tokenizer is {node!r}; expected keys with values, as the run wrote it")
    kept = folder / TOKENIZER_FOLDER
    return {**node, "path": str(kept)} if node.get("path") and kept.is_dir() else node


def check_tokenizer(node: Any, folder: Path, trust: Sequence[str]) -> None:
    """Raises: ValueError if a tokenizer's node refers to files outside the run's copies, or if a copy is too large."""
    kept = folder / TOKENIZER_FOLDER
    for file in kept.iterdir() if kept.is_dir() else ():
        if not file.is_file() or file.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"{file} is no regular file of at most {_MAX_TOKENIZER_BYTES} bytes; remove it")
    for path, value in leaves(node, "data.tokenizer"):
        check_text(value, f"config.yaml: {path}")
        key = path.rpartition(".")[2]
        is_kept = path == "data.tokenizer.path" and value == str(kept)
        if not isinstance(value, str) or value in trust or is_kept or key not in ("path", "name"):
            continue
        is_of_open_clip = path == "data.tokenizer.name" and node.get("_target_") == f"{TOKENIZERS}.tokenizer_of"
        is_folder = os.path.lexists(value) and not is_of_open_clip  # hub names that are local paths are read there
        if key == "path" or is_folder or not _HUB_NAME.fullmatch(value):
            raise ValueError(
                f"config.yaml: {path} is {value!r}, which leads to files elsewhere, and the run has kept no copy in "
                f"{kept}; if you know them, name it: trust=[{value!r}]"
            )


@contextmanager
def offline() -> Iterator[None]:
    """Make Hugging Face's libraries use only their cache, never the network, inside the block."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the environment variable is read at import only
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextmanager
def at_most(num_parameters: int, num_elements: int, source: Path) -> Iterator[None]:
    """Limit the parameters that modules register inside the block, by their number and their total number of elements.

    Raises: ValueError if a limit is exceeded.
    """
    parameters, elements = 0, 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, elements
        parameters += 1
        elements += 0 if parameter is None else parameter.numel()
        if parameters > num_parameters or elements > num_elements:
            raise ValueError(f"{source}: the model has more weights than the checkpoint; expected the run's own file")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def needs_memory(error: BaseException | None) -> bool:
    """Return True if building a model on the meta device failed because its constructor needs values of tensors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # the chain of causes may be cyclic
        seen.add(id(error))
        if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
            return True
        if type(error) is RuntimeError and str(error).startswith("Tensor.item() cannot be called on meta tensors"):
            return True
        error = error.__cause__ or error.__context__
    return False
