"""A trained model from a run's directory or one of its checkpoints.

A run's directory may come from others: nothing in it is executed, followed to other files or to a hub, or taken for
larger than its weights are. SECURITY.md says what that covers.
"""

import importlib
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mmpretrain import checkpoint, config, targets
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel, TextEncoder

_MODELS, _TOKENIZERS = "mmpretrain.models", "mmpretrain.data.tokenizer"
TOKENIZER_FOLDER = "tokenizer"  # in a run's directory: the files of a local tokenizer
"""Where a run keeps the local tokenizer that it was trained with."""
_TIMM_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_TOKENIZER_BYTES = 256 << 20
# A model of fewer numbers than this is small whatever its sizes are.
_SMALL_MODEL = 1 << 16
_SMALL_BUFFERS = 1 << 28
_ELSEWHERE = re.compile(r"[/\\:~]")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model with what stands around it."""

    model: ImageTextModel
    preprocess: Preprocess
    tokenizer: Tokenizer
    scalars: Mapping[str, float]
    """`logit_scale` and `logit_bias` as the loss sees them, of the first objective that learns them."""
    config: Mapping[str, Any]
    """The run's config.yaml as it stands there; `setting` reads one value of it."""
    path: Path
    state: Mapping[str, Any]

    def setting(self, key: str, annotation: Any) -> Any:
        """A value of the run's configuration by its full name. Raises: ValueError if it is none of that type."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return checked(value, key, annotation)


def checked(value: Any, key: str, annotation: Any) -> Any:
    """A value of a run's configuration. Raises: ValueError if it is not of the type, or asks for what is elsewhere."""
    for path, leaf in _leaves(value, key):
        _check_text(leaf, f"config.yaml: {path}")
    if not targets.accepts(value, annotation):
        raise ValueError(
            f"config.yaml: {key} is {value!r}; expected {targets.expected_type(annotation)}, as the run wrote it"
        )
    return value


def find(run_or_checkpoint: str | Path) -> tuple[Path, Path]:
    """(the run's directory, the checkpoint) of either. Raises: ValueError if there is none."""
    path = Path(run_or_checkpoint)
    if path.name in ("best", "latest") and path.exists():
        path = path.with_name(checkpoint.read_name(path))
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        return path.absolute().parent.parent, path
    newest = checkpoint.find_latest(path / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{path} holds no checkpoint; expected a run's directory, or a step_* folder in its checkpoints"
        )
    return path, newest


def _lookup(home: str, trust: Sequence[str]) -> targets.Lookup:
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


def _without_weights(node: Any) -> Any:
    """A model's node without what would make timm read or fetch weights: they are in the checkpoint."""
    if isinstance(node, list):
        return [_without_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_weights(value) for key, value in node.items() if key not in _TIMM_WEIGHTS}


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values in any containers, with their full names; targets are left out."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "_target_":
                yield from _leaves(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, node


def _check_text(value: Any, path: str) -> None:
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{path} is {value!r}, which a file that may come from others cannot ask for; replace it in the file, or "
            "give the value on the command line where there is a key for it"
        )


def _check_model_node(node: Any, largest: int, trust: Sequence[str]) -> None:
    """Raises: ValueError for a value of a model's node that leads elsewhere, or is larger than its weights allow."""
    for path, value in _leaves(node, "config.yaml: model"):
        _check_text(value, path)
        is_hub_name = path.endswith((".hf_model_name", ".hf_tokenizer_name"))
        if isinstance(value, str) and value not in trust and (is_hub_name or _ELSEWHERE.search(value)):
            raise ValueError(
                f"{path} is {value!r}, which leads to files elsewhere; if you know them, name it: trust=[{value!r}]"
            )
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{path} is {value}; expected at most {largest}, since its weights have no more numbers")


def _with_own_files(node: Any, folder: Path) -> dict[str, Any]:
    """A tokenizer's node that reads the files that the run has kept, not those it was made from."""
    if not isinstance(node, dict):
        raise ValueError(f"config.yaml: data.tokenizer is {node!r}; expected keys with values, as the run wrote it")
    kept = folder / TOKENIZER_FOLDER
    return {**node, "path": str(kept)} if node.get("path") and kept.is_dir() else node


def _check_tokenizer_node(node: Any, folder: Path, trust: Sequence[str]) -> None:
    """Raises: ValueError for a tokenizer's node that would read other files than the run has kept, or no small ones."""
    kept = folder / TOKENIZER_FOLDER
    for file in kept.iterdir() if kept.is_dir() else ():
        if not file.is_file() or file.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"{file} is no regular file of at most {_MAX_TOKENIZER_BYTES} bytes; remove it")
    for path, value in _leaves(node, "data.tokenizer"):
        _check_text(value, f"config.yaml: {path}")
        key = path.rpartition(".")[2]
        is_kept = path == "data.tokenizer.path" and value == str(kept)
        if not isinstance(value, str) or value in trust or is_kept or key not in ("path", "name"):
            continue
        is_of_open_clip = path == "data.tokenizer.name" and node.get("_target_") == f"{_TOKENIZERS}.tokenizer_of"
        is_folder = os.path.lexists(value) and not is_of_open_clip  # a hub's name that is a folder is read there
        if key == "path" or is_folder or not _HUB_NAME.fullmatch(value):
            raise ValueError(
                f"config.yaml: {path} is {value!r}, which leads to files elsewhere, and the run has kept no copy in "
                f"{kept}; if you know them, name it: trust=[{value!r}]"
            )


@contextmanager
def _offline() -> Iterator[None]:
    """Inside the block Hugging Face's libraries use what is in their cache, and never the network."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the environment is read once, when it is imported
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextmanager
def _at_most(num_parameters: int, source: Path) -> Iterator[None]:
    """Inside the block modules may register so many parameters. Raises: ValueError for one more."""
    count = 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > num_parameters:
            raise ValueError(f"{source}: the model has more layers than there are weights; expected the run's own file")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _built(what: str, source: Path, build: Callable[[], Any]) -> Any:
    """What `build` makes of a part of a configuration that may say anything. Raises: ValueError where it cannot."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except BaseException as error:  # arguments of a wrong type or of no sense fail in as many ways as there are parts
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        reason = next(iter(str(error).splitlines()), "no reason is given")
        raise ValueError(f"{source}: {what} cannot be built ({type(error).__name__}: {reason})") from error


def _built_model(resolved: Any, tensors: Mapping[str, Tensor], source: Path) -> ImageTextModel:
    """The model of a resolved node, with random weights, once it is known to be no larger than its weights.

    Raises: ValueError if they are those of another model.
    """

    def build() -> Any:
        return _built("model", source, lambda: targets.call(resolved, 0))

    with _at_most(10 * len(tensors) + 1000, source):
        try:
            with torch.device("meta"):  # which takes no memory
                model = build()
        except ValueError as error:
            if "meta tensor" not in str(error):
                raise
            model = build()  # one that computes numbers while it is built, which only memory can hold
    if not isinstance(model, ImageTextModel):
        raise ValueError(f"{source}: model is a {type(model).__name__}; expected a model of images and texts")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != given:
        names = sorted(name for name in {**expected, **given} if expected.get(name) != given.get(name))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"the checkpoint does not hold the weights of the model in {source}: {names[0]} is "
            f"{_shape(given.get(names[0]))}, expected {_shape(expected.get(names[0]))}{more}"
        )
    if sum(buffer.numel() for buffer in model.buffers()) > max(_numel(tensors), _SMALL_BUFFERS):
        raise ValueError(f"{source}: the model's buffers are larger than its weights; expected the run's own file")
    built: ImageTextModel = build()
    return built


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _numel(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def preprocess_of(model: ImageTextModel) -> Preprocess:
    """What evaluation does to a model's images."""
    return Preprocess(model.image.image_size, model.num_channels, model.squash)


def fit_tokenizer(tokenizer: Tokenizer, text: TextEncoder) -> None:
    """Check that a text encoder can take a tokenizer's ids, and let it know which of them is padding.

    Raises: ValueError if it cannot.
    """
    if text.adopts_padding and tokenizer.pad_id is not None:
        text.pad_id = tokenizer.pad_id
    if tokenizer.context_length > text.context_length:
        raise ValueError(
            f"data.tokenizer.context_length is {tokenizer.context_length}; expected at most model.text.context_length = "
            f"{text.context_length}: leave it out, or make the encoder's larger"
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size is {text.vocab_size}; expected at least the tokenizer's {tokenizer.vocab_size}: set it so"
        )
    for key, wanted, given in (
        ("pad_id", text.pad_id, tokenizer.pad_id),
        ("eos_id", text.end_id, tokenizer.end_id),
    ):
        if key == "pad_id" and given is None and text.adopts_padding:
            continue  # a tokenizer without padding leaves it to the encoder
        if wanted is not None and given != wanted:
            raise ValueError(
                f"the text encoder's {key} is {wanted}, and the tokenizer's is {given}; expected the same: "
                f"model.text.{key}={given}, or another data.tokenizer"
            )


def load_checkpoint(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    ema: bool = False,
) -> Loaded:
    """Build a checkpoint's model and fill in its weights; objectives and what only they use stay out.

    The network is never asked for anything.

    Args:
        run_or_checkpoint: a run's directory, or one of its checkpoints.
        device: where the model goes.
        trust: what the checkpoint's configuration may name beside our own: modules, whose classes are then imported;
            and folders and names of a hub, as they stand there.
        ema: whether to take the weights' moving average.

    Raises: ValueError if there is no checkpoint, it has no average, its configuration names other parts, or its files
        are not what a run writes.
    """
    folder, path = find(run_or_checkpoint)
    source = folder / "config.yaml"
    saved = config.read(source)
    if lacking := sorted({"model", "objective", "data"} - saved.keys()):
        raise ValueError(f"{source} has no {lacking[0]!r}; expected the file as the run wrote it")
    if not isinstance(saved["objective"], dict) or not isinstance(saved["data"], dict):
        raise ValueError(f"{source}: objective and data have no keys; expected the file as the run wrote it")
    if ema and not (path / "ema.safetensors").is_file():
        raise ValueError(f"{path} has no averaged weights; expected a run with trainer.ema_decay, or leave out ema")
    tensors = checkpoint.load_tensors(path, "ema.safetensors" if ema else "model.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    node, tokenizer_node = _without_weights(saved["model"]), saved["data"].get("tokenizer")
    model_parts = targets.resolve(node, "model", _lookup(_MODELS, trust))
    tokenizer_node = _with_own_files(tokenizer_node, folder)
    tokenizer_parts = targets.resolve(tokenizer_node, "data.tokenizer", _lookup(_TOKENIZERS, trust))
    _check_model_node(node, max(_numel(weights), _SMALL_MODEL), trust)
    _check_tokenizer_node(tokenizer_node, folder, trust)
    with _offline():
        model = _built_model(model_parts, weights, source)
        tokenizer: Tokenizer = _built("data.tokenizer", source, lambda: targets.call(tokenizer_parts, 0))
    model.load_state_dict(weights)
    if model.text is not None:
        _built("data.tokenizer", source, lambda: fit_tokenizer(tokenizer, typing.cast(TextEncoder, model.text)))
    return Loaded(
        model=model.to(device).eval(),
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        scalars=_scalars(tensors, list(saved["objective"]), path),
        config=saved,
        path=path,
        state=checkpoint.load_state(path),
    )


def _scalars(tensors: Mapping[str, Tensor], objectives: Sequence[str], path: Path) -> dict[str, float]:
    """`logit_scale` and `logit_bias` of the first objective that has them, as in training."""
    scalars = {}
    for scalar in ("logit_scale", "logit_bias"):
        for name in [f"objectives.{objective}.{scalar}" for objective in reversed(objectives)]:
            if name in tensors:
                if tensors[name].numel() != 1:
                    raise ValueError(f"{path}: {name} is {_shape(tensors[name].shape)}; expected one number")
                scalars[scalar] = float(tensors[name].exp() if scalar == "logit_scale" else tensors[name])
    return scalars
