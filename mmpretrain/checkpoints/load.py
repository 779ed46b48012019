"""Loading of a trained model from a run's directory or one of its checkpoints.

A run's directory may come from others. Nothing in it is executed, no reference to other files or to a hub is followed, and
no model larger than its weights is built. SECURITY.md describes the scope of this protection.
"""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain import files
from mmpretrain.checkpoints import foreign, store, untrusted
from mmpretrain.checkpoints.building import SMALL_PART, built, built_module, numel, shape_text
from mmpretrain.checkpoints.loaded import Loaded, checked, fit_tokenizer, preprocess_of
from mmpretrain.checkpoints.objectives import load_objectives
from mmpretrain.config import config_yaml, instantiate
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.encoders import TextEncoder
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import has_adapters, merge_adapters


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


def load_checkpoint(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    ema: bool = False,
) -> Loaded:
    """Build a checkpoint's model and load its weights. Objectives are built on first use (`Loaded.objectives`).

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
    manifest = store.manifest_hash(path)
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
    untrusted.check_model(node, max(numel(weights), SMALL_PART), trust, folder)
    untrusted.check_tokenizer(tokenizer_node, folder, trust)

    def build_model() -> ImageTextModel:
        model = instantiate.call(model_parts, 0)
        if not isinstance(model, ImageTextModel):
            raise ValueError(f"{source}: model is a {type(model).__name__}; expected a model of images and texts")
        return model

    with untrusted.offline():
        model: ImageTextModel = built_module("model", build_model, weights, source)
        tokenizer: Tokenizer = built("data.tokenizer", source, lambda: instantiate.call(tokenizer_parts, 0))
    model.load_state_dict(weights)
    if model.text is not None:
        built("data.tokenizer", source, lambda: fit_tokenizer(tokenizer, typing.cast(TextEncoder, model.text)))
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("objectives.")}
    return Loaded(
        model=model.to(device).eval(),
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        scalars=_scalars(tensors, list(saved["objective"]), path),
        config=saved,
        folder=folder,
        num_samples=store.load_state(path).get("samples", 0),
        checkpoint=path.absolute(),
        manifest=manifest,
        build_objectives=lambda: load_objectives(
            saved["objective"], heads, model, tokenizer, source, class_names(folder), trust
        ),
    )


def class_names(folder: Path) -> dict[str, Sequence[str]]:
    """Return the names of the classes that each objective predicts, from run.json. Raises: ValueError if it is malformed."""
    path = folder / "run.json"
    names = files.read_json(path).get("classes", {}) if path.exists() else {}
    if not instantiate.accepts(names, Mapping[str, Sequence[str]]):
        raise ValueError(f"{path}: classes is {str(names)[:80]}; expected lists of names, as the run wrote them")
    return typing.cast(dict[str, Sequence[str]], names)


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
        if (name := learned_scalar(tensors, objectives, scalar)) is not None:
            if tensors[name].numel() != 1:
                raise ValueError(f"{path}: {name} is {shape_text(tensors[name].shape)}; expected one number")
            scalars[scalar] = float(tensors[name].exp() if scalar == "logit_scale" else tensors[name])
    return scalars


def learned_scalar(tensors: Mapping[str, Tensor], objectives: Sequence[str], scalar: str = "logit_scale") -> str | None:
    """Return the full name of a scalar of the first objective that has it; None if there is none.

    Args:
        tensors: weights by full name.
        objectives: names of the objectives, in the order of the configuration.
        scalar: `logit_scale` or `logit_bias`.
    """
    names = (f"objectives.{objective}.{scalar}" for objective in objectives)
    return next((name for name in names if name in tensors), None)
