"""Loading of a trained model from a run's directory or one of its checkpoints.

A run's directory may come from others. Nothing in it is executed, no reference to other files or to a hub is followed, and
no model larger than its weights is built. SECURITY.md describes the scope of this protection.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain.checkpoints import foreign, store, untrusted
from mmpretrain.checkpoints.loaded import Loaded, checked, fit_tokenizer, preprocess_of
from mmpretrain.config import config_yaml, instantiate
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.encoders import TextEncoder
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import has_adapters, merge_adapters

# Numbers of elements below which a model or its buffers are never refused as too large.
_SMALL_MODEL = 1 << 16
_SMALL_BUFFERS = 1 << 28


def find(run_or_checkpoint: str | Path) -> tuple[Path, Path]:
    """Return (run directory, checkpoint) for either of them. Raises: ValueError if there is no valid checkpoint."""
    path = Path(run_or_checkpoint)
    if path.name in ("best", "latest") and path.exists():
        path = path.with_name(store.read_name(path))
    if (path / "manifest.json").exists():
        store.verify(path)
        return path.absolute().parent.parent, path
    newest = store.find_latest(path / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{path} holds no checkpoint; expected a run's directory, or a step_* folder in its checkpoints"
        )
    return path, newest


def _built(what: str, source: Path, build: Callable[[], Any]) -> Any:
    """Call `build` on an unchecked part of a configuration. Raises: ValueError for any error in it."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except BaseException as error:  # invalid arguments raise different exceptions in different parts
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # raised by Rust libraries
            raise
        reason = next(iter(str(error).splitlines()), "no reason is given")
        raise ValueError(f"{source}: {what} cannot be built ({type(error).__name__}: {reason})") from error


def _built_model(resolved: Any, tensors: Mapping[str, Tensor], source: Path) -> ImageTextModel:
    """Build the model of a resolved node with random weights, after checking that it is not larger than `tensors`.

    Raises: ValueError if names or shapes of `tensors` are not those of the model.
    """

    def build() -> Any:
        return _built("model", source, lambda: instantiate.call(resolved, 0))

    # Allow twice the size, since a part may be built and then replaced.
    limits = 10 * len(tensors) + 1000, 2 * _numel(tensors) + _SMALL_MODEL
    try:
        with untrusted.at_most(*limits, source), torch.device("meta"):  # needs no memory
            model = build()
    except ValueError as error:
        if not untrusted.needs_memory(error):
            raise
        with untrusted.at_most(*limits, source):
            model = build()
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


def load_checkpoint(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    ema: bool = False,
) -> Loaded:
    """Build a checkpoint's model and load its weights. Objectives are not built.

    The network is only used for published weights of open_clip and timm.

    Args:
        run_or_checkpoint: a run's directory, or one of its checkpoints; or a model of another library, as `foreign` reads it.
        device: device of the model.
        trust: names beyond mmpretrain's own that the checkpoint's configuration may use: modules, which are then imported,
            folders and hub names, spelled as in the configuration, and types of models of Hugging Face.
        ema: load the moving average of the weights.

    Raises: ValueError if there is no valid checkpoint, it has no averaged weights, its configuration names other parts, or
        its files are not as a run writes them.
    """
    if foreign.is_foreign(run_or_checkpoint):
        if ema:
            raise ValueError(f"{run_or_checkpoint} has no averaged weights; leave out ema")
        return foreign.load(str(run_or_checkpoint), device)
    folder, path = find(run_or_checkpoint)
    source = folder / "config.yaml"
    saved = config_yaml.read(source)
    if lacking := sorted({"model", "objective", "data"} - saved.keys()):
        raise ValueError(f"{source} has no {lacking[0]!r}; expected the file as the run wrote it")
    if not isinstance(saved["objective"], dict) or not isinstance(saved["data"], dict):
        raise ValueError(f"{source}: objective and data have no keys; expected the file as the run wrote it")
    if ema and not store.has(path, "ema"):
        raise ValueError(f"{path} has no averaged weights; expected a run with trainer.ema_decay, or leave out ema")
    tensors = store.load_tensors(path, "ema" if ema else "model")
    tensors = merged_as_saved(tensors, saved)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    node = untrusted.with_own_configs(untrusted.without_weights(saved["model"]), folder)
    tokenizer_node = saved["data"].get("tokenizer")
    model_parts = instantiate.resolve(node, "model", untrusted.lookup(untrusted.MODELS, trust))
    tokenizer_node = untrusted.with_own_files(tokenizer_node, folder)
    tokenizer_parts = instantiate.resolve(
        tokenizer_node, "data.tokenizer", untrusted.lookup(untrusted.TOKENIZERS, trust)
    )
    untrusted.check_model(node, max(_numel(weights), _SMALL_MODEL), trust, folder)
    untrusted.check_tokenizer(tokenizer_node, folder, trust)
    with untrusted.offline():
        model = _built_model(model_parts, weights, source)
        tokenizer: Tokenizer = _built("data.tokenizer", source, lambda: instantiate.call(tokenizer_parts, 0))
    model.load_state_dict(weights)
    if model.text is not None:
        _built("data.tokenizer", source, lambda: fit_tokenizer(tokenizer, typing.cast(TextEncoder, model.text)))
    return Loaded(
        model=model.to(device).eval(),
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        scalars=_scalars(tensors, list(saved["objective"]), path),
        config=saved,
        folder=folder,
        num_samples=store.load_state(path).get("samples", 0),
    )


def merged_as_saved(tensors: dict[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Merge the adapters of a run into its weights.

    Args:
        tensors: weights of the run; those without adapters are returned as they are.
        saved: content of the run's config.yaml.

    Raises: ValueError if the adapters do not fit, or the configuration lacks their scale.
    """
    if not has_adapters(tensors):
        return tensors
    value: Any = saved
    for key in ("trainer", "lora", "alpha"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return merge_adapters(tensors, checked(value, "trainer.lora.alpha", float))


def _scalars(tensors: Mapping[str, Tensor], objectives: Sequence[str], path: Path) -> dict[str, float]:
    """Return `logit_scale` and `logit_bias` of the first objective that has them, as in training."""
    scalars = {}
    for scalar in ("logit_scale", "logit_bias"):
        for name in [f"objectives.{objective}.{scalar}" for objective in reversed(objectives)]:
            if name in tensors:
                if tensors[name].numel() != 1:
                    raise ValueError(f"{path}: {name} is {_shape(tensors[name].shape)}; expected one number")
                scalars[scalar] = float(tensors[name].exp() if scalar == "logit_scale" else tensors[name])
    return scalars
