"""Restrictions on a configuration that came with a checkpoint: classes, files and sizes (see SECURITY.md)."""

import copy
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
from mmpretrain.models.huggingface import CONFIG_FILE, read_config

MODELS, OBJECTIVES = "mmpretrain.models", "mmpretrain.objectives"
TOKENIZERS, SOURCES = "mmpretrain.data.tokenizer", "mmpretrain.data"
SOURCE_MEMBERS = ("num_samples", "fingerprint", "key", "location", "read")
TOKENIZER_FOLDER = "tokenizer"
"""Folder in a run's directory with a copy of the local tokenizer that it was trained with."""
HUGGINGFACE_FOLDER = "huggingface"
"""Folder in a run's directory with a copy of the config.json of each model of Hugging Face, by its place in the model."""
_HUGGINGFACE = "mmpretrain.models.huggingface"
# Types of models that build nothing but layers from their configuration. Others may name backbones of timm or of the hub.
_HUGGINGFACE_TYPES = (
    "albert", "bert", "camembert", "convnext", "convnextv2", "deberta", "deberta-v2", "deit", "dinov2", "distilbert",
    "electra", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "modernbert", "mpnet", "olmo2", "opt", "qwen2", "qwen3",
    "resnet", "roberta", "swin", "swinv2", "vit", "xlm-roberta",
)  # fmt: skip
_SMALL_INTEGER = 1 << 20  # such as the positions of a model whose weights do not depend on them
_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_TOKENIZER_BYTES = 256 << 20
_ELSEWHERE = re.compile(r"[/\\:~]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def lookup(home: str, trust: Sequence[str], members: Sequence[str] = ()) -> instantiate.Lookup:
    """Return a lookup of the `_target_`s that a checkpoint's configuration may name: parts of `home` and trusted modules.

    A part is a class, or a function whose return annotation is `Tokenizer`, `SampleSource` or a subclass of
    `torch.nn.Module`, defined in the module or in a trusted one. Names that the module only imports (such as `os.system`)
    and other functions are refused. Parts of `home` must have the attributes `members`.
    """

    def find(target: Any, path: str) -> Any:
        module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
        part = None
        if all(word.isidentifier() for word in [*module.split("."), name]) and _is_below(module, (home, *trust)):
            part = _part(module, name, trust)
        if part is None or not (_is_below(module, trust) or all(hasattr(part, member) for member in members)):
            raise ValueError(
                f"config.yaml: {path}._target_ is {target!r}, which came with the checkpoint and is no part of "
                f"mmpretrain that belongs there; if you know that code, name its module: trust=[{module}]"
            )
        return part

    return find


def _is_below(module: Any, known: Sequence[str]) -> bool:
    """Return True if a module's name is one of the known ones, or below one of them."""
    return isinstance(module, str) and any(module == each or module.startswith(f"{each}.") for each in known)


def _part(module: str, name: str, trust: Sequence[str]) -> Any:
    try:
        part = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    defined_in = getattr(part, "__module__", None)
    if defined_in != module and not _is_below(defined_in, trust):
        return None
    if isinstance(part, type):
        return part
    made = typing.get_type_hints(part).get("return") if inspect.isfunction(part) else None
    is_module = isinstance(made, type) and issubclass(made, nn.Module)
    return part if is_module or made in (Tokenizer, SampleSource) else None


def without_weights(node: Any) -> Any:
    """Remove the arguments that make a library read or download weights, which the checkpoint already has."""
    if isinstance(node, list):
        return [without_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    is_of_torchvision = str(node.get("_target_")).startswith("torchvision.")
    dropped = (*_WEIGHTS, "weights", "weights_backbone") if is_of_torchvision else _WEIGHTS
    return {key: without_weights(value) for key, value in node.items() if key not in dropped}


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


def huggingface_nodes(node: Any, name: str = "") -> dict[str, dict[str, Any]]:
    """Return the nodes of a model's configuration that name a local model of Hugging Face, by their place in the model."""
    if not isinstance(node, dict):
        return {}
    found = {}
    if str(node.get("_target_")).startswith(f"{_HUGGINGFACE}.") and re.fullmatch(r"\w+(\.\w+)*", name):
        found[name] = node
    for key, value in node.items():
        found |= huggingface_nodes(value, f"{name}.{key}" if name else str(key))
    return found


def with_own_configs(node: Any, folder: Path) -> Any:
    """Point the models of Hugging Face in a model's node to the copies of their config.json in the run's directory.

    Models without a copy are left as they are, and `check_model` refuses their paths.
    """
    node = copy.deepcopy(node)
    for name, part in huggingface_nodes(node).items():
        if (kept := folder / HUGGINGFACE_FOLDER / name).is_dir():
            part["path"] = str(kept)
    return node


def check_model(node: Any, largest: int, trust: Sequence[str], folder: Path) -> None:
    """Check the values of a model's node.

    Args:
        node: the model's node, with `with_own_configs`.
        largest: number of elements of the model's weights, which no number may exceed.
        trust: names of files, hubs and types of models that are allowed.
        folder: the run's directory.

    Raises: ValueError for a value that refers to files outside the run's directory or is too large, and for a config.json
        of Hugging Face with such a value or of a type that is not known to build nothing but layers.
    """
    kept = {f"config.yaml: model.{name}.path": folder / HUGGINGFACE_FOLDER / name for name in huggingface_nodes(node)}
    for path, value in leaves(node, "config.yaml: model"):
        check_text(value, path)
        if path in kept and value == str(kept[path]):
            _check_config(kept[path], largest, trust)
        else:
            _check_value(value, path, largest, trust)


def check_objective(node: Any, name: str, largest: int, trust: Sequence[str]) -> None:
    """Check the values of an objective's node.

    Args:
        node: the node of the objective `name`.
        name: name of the objective.
        largest: number of elements of the weights of the model and the objective, which no number may exceed.
        trust: names of files and hubs that are allowed.

    Raises: ValueError for a value that refers to files or is too large.
    """
    for path, value in leaves(node, f"config.yaml: objective.{name}"):
        check_text(value, path)
        _check_value(value, path, max(largest, _SMALL_INTEGER), trust)


def _check_value(value: Any, path: str, largest: int, trust: Sequence[str]) -> None:
    is_name = path.endswith((".path", ".hf_model_name", ".hf_tokenizer_name"))
    if isinstance(value, str) and value not in trust and (is_name or _ELSEWHERE.search(value)):
        raise ValueError(
            f"{path} is {value!r}, which leads to files elsewhere; if you know them, name it: trust=[{value!r}]"
        )
    if isinstance(value, int) and value > largest:
        raise ValueError(f"{path} is {value}; expected at most {largest}, given the size of its weights")


def _check_config(folder: Path, largest: int, trust: Sequence[str]) -> None:
    """Check a run's copy of a config.json of Hugging Face. Raises: see `check_model`."""
    fields = read_config(folder)
    file = folder / CONFIG_FILE
    if fields["model_type"] not in (*_HUGGINGFACE_TYPES, *trust):
        raise ValueError(
            f"{file}: model_type is {fields['model_type']!r}, which may build more than layers; if you know it: "
            f"trust=[{fields['model_type']}]"
        )
    largest = max(largest, _SMALL_INTEGER)
    for path, value in [leaf for key, part in fields.items() for leaf in leaves(part, f"{file}: {key}")]:
        check_text(value, path)
        if isinstance(value, str) and _ELSEWHERE.search(value):
            raise ValueError(f"{path} is {value!r}, which leads elsewhere; expected the file as the run wrote it")
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{path} is {value}; expected at most {largest}, given the size of the model's weights")


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
def at_most(num_parameters: int, num_elements: int, what: str, source: Path) -> Iterator[None]:
    """Limit the parameters that modules register inside the block, by their number and their total number of elements.

    Raises: ValueError that says of `what`, a part of the configuration `source`, that it exceeds a limit.
    """
    parameters, elements = 0, 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, elements
        parameters += 1
        elements += 0 if parameter is None else parameter.numel()
        if parameters > num_parameters or elements > num_elements:
            raise ValueError(f"{source}: the {what} has more weights than the checkpoint; expected the run's own file")

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
