"""What a configuration that came with a checkpoint may name, ask for and make: see SECURITY.md."""

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
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel

MODELS, TOKENIZERS = "mmpretrain.models", "mmpretrain.data.tokenizer"
TOKENIZER_FOLDER = "tokenizer"  # in a run's directory: the files of a local tokenizer
"""Where a run keeps the local tokenizer that it was trained with."""
_TIMM_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_TOKENIZER_BYTES = 256 << 20
_ELSEWHERE = re.compile(r"[/\\:~]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def lookup(home: str, trust: Sequence[str]) -> instantiate.Lookup:
    """Finds what a configuration may name that came with a checkpoint: parts of `home` and of trusted modules.

    Such a part is a class of the module itself, or a function that says it returns a model or a tokenizer. What the
    module merely imports (`os.system`) is none, nor is any other function of it.
    """

    def find(target: Any, path: str) -> Any:
        module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
        part = None
        if all(word.isidentifier() for word in [*module.split("."), name]) and any(
            module == known or module.startswith(f"{known}.") for known in (home, *trust)
        ):
            part = _part(module, name)
        if part is None:
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
    return part if made in (ImageTextModel, Tokenizer) or (made is part and isinstance(part, type)) else None


def without_weights(node: Any) -> Any:
    """A model's node without what would make timm read or fetch weights: they are in the checkpoint."""
    if isinstance(node, list):
        return [without_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: without_weights(value) for key, value in node.items() if key not in _TIMM_WEIGHTS}


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values in any containers, with their full names; targets are left out."""
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
    """Raises: ValueError for an interpolation, which could ask for anything of this process."""
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{path} is {value!r}, which a file that may come from others cannot ask for; replace it in the file, or "
            "give the value on the command line where there is a key for it"
        )


def check_model(node: Any, largest: int, trust: Sequence[str]) -> None:
    """Raises: ValueError for a value of a model's node that leads elsewhere, or is larger than its weights allow."""
    for path, value in leaves(node, "config.yaml: model"):
        check_text(value, path)
        is_hub_name = path.endswith((".hf_model_name", ".hf_tokenizer_name"))
        if isinstance(value, str) and value not in trust and (is_hub_name or _ELSEWHERE.search(value)):
            raise ValueError(
                f"{path} is {value!r}, which leads to files elsewhere; if you know them, name it: trust=[{value!r}]"
            )
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{path} is {value}; expected at most {largest}, since its weights have no more numbers")


def with_own_files(node: Any, folder: Path) -> dict[str, Any]:
    """A tokenizer's node that reads the files that the run has kept, not those it was made from."""
    if not isinstance(node, dict):
        raise ValueError(f"config.yaml: data.tokenizer is {node!r}; expected keys with values, as the run wrote it")
    kept = folder / TOKENIZER_FOLDER
    return {**node, "path": str(kept)} if node.get("path") and kept.is_dir() else node


def check_tokenizer(node: Any, folder: Path, trust: Sequence[str]) -> None:
    """Raises: ValueError for a tokenizer's node that would read other files than the run has kept, or no small ones."""
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
        is_folder = os.path.lexists(value) and not is_of_open_clip  # a hub's name that is a folder is read there
        if key == "path" or is_folder or not _HUB_NAME.fullmatch(value):
            raise ValueError(
                f"config.yaml: {path} is {value!r}, which leads to files elsewhere, and the run has kept no copy in "
                f"{kept}; if you know them, name it: trust=[{value!r}]"
            )


@contextmanager
def offline() -> Iterator[None]:
    """Inside the block Hugging Face's libraries use what is in their cache, and never the network."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the environment is read once, when it is imported
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextmanager
def at_most(num_parameters: int, num_elements: int, source: Path) -> Iterator[None]:
    """Inside the block modules may register so many parameters, of so many elements together.

    Raises: ValueError for more.
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
    """Whether a model could not be built on the meta device because it computes numbers while it is built."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # causes may form a ring
        seen.add(id(error))
        if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
            return True
        if type(error) is RuntimeError and str(error).startswith("Tensor.item() cannot be called on meta tensors"):
            return True
        error = error.__cause__ or error.__context__
    return False
