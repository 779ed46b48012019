"""Interpolation of checkpoints of one model in the space of weights: WiSE-FT and model soups."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain import files
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import class_names, find, learned_scalar, merged_as_saved
from mmpretrain.checkpoints.untrusted import HUGGINGFACE_FOLDER, TOKENIZER_FOLDER
from mmpretrain.config import config_yaml

Tensors = Mapping[str, Tensor]


def interpolate(
    checkpoints: Sequence[Tensors], weights: Sequence[float], scales: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the weighted sum of the weights of several checkpoints.

    theta = sum_k w_k theta_k

    With the weights (1 - alpha, alpha) of two checkpoints it is WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903, section 3),
    with 1/n of n checkpoints a uniform model soup (Wortsman et al. 2022, arXiv:2203.05482, section 2). Parameters are
    interpolated as they are stored, `logit_scale` as a logarithm. Sums are in float64. Integers are those of the last one.

    Args:
        checkpoints: theta_k, tensors by name: `model.*` and `objectives.*`. Those of objectives that not all checkpoints have
            are left out.
        weights: w_k, one for each checkpoint.
        scales: name of each checkpoint's `logit_scale`, to be interpolated under the name of the first (see `own_scales`).

    Returns: tensors by name, with the dtypes of the last checkpoint.
    Raises: ValueError if the checkpoints have different models.
    """
    last = checkpoints[-1]
    for other in checkpoints[:-1]:
        _check_same_model(other, last)
    names = [name for name in last if not name.startswith(tuple(_prefix(each) for each in left_out(checkpoints)))]
    mixed = {
        name: _sum([other[name] for other in checkpoints], weights) if last[name].is_floating_point() else last[name]
        for name in names
    }
    if scales:
        mixed[scales[0]] = _sum([other[name] for other, name in zip(checkpoints, scales, strict=True)], weights)
    return mixed


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    terms = [weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)]
    return torch.stack(terms).sum(0).to(tensors[-1].dtype)


def left_out(checkpoints: Sequence[Tensors]) -> set[str]:
    """Return the names of the last checkpoint's objectives with a tensor that another lacks or has in another shape."""
    return {
        name.split(".")[1]
        for name, tensor in checkpoints[-1].items()
        if name.startswith("objectives.") and any(_shape(name, other) != tensor.shape for other in checkpoints)
    }


def own_scales(checkpoints: Sequence[Tensors], objectives: Sequence[Sequence[str]]) -> list[str]:
    """Return the name of each checkpoint's `logit_scale` if the objectives that learned them have different names.

    This is so between a pre-trained and a fine-tuned run. The list is empty if a scale is kept under its own name, a
    checkpoint has none, or the first one's objective has learned more than its scale.

    Args:
        checkpoints: tensors by name.
        objectives: names of the objectives of each checkpoint, in the order of its configuration.
    """
    learned = [learned_scalar(tensors, names) for tensors, names in zip(checkpoints, objectives, strict=True)]
    scales = [name for name in learned if name is not None]
    if len(scales) < len(checkpoints) or all(name == scales[0] for name in scales):
        return []
    of_first = [name for name in checkpoints[0] if name.startswith(scales[0].removesuffix("logit_scale"))]
    return scales if of_first == scales[:1] else []


def _prefix(objective: str) -> str:
    return f"objectives.{objective}."


def _shape(name: str, tensors: Tensors) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _check_same_model(given: Tensors, expected: Tensors) -> None:
    """Raises: ValueError that names the first tensor of the model whose shape differs."""
    names = sorted(name for name in {*given, *expected} if name.startswith("model."))
    wrong = [name for name in names if _shape(name, given) != _shape(name, expected)]
    if wrong:
        shapes = [
            "absent" if shape is None else list(shape) for shape in (_shape(wrong[0], t) for t in (given, expected))
        ]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"the checkpoints are not of one model: {wrong[0]} is {shapes[0]} in one and {shapes[1]} in another{more}; "
            "expected runs of the same model"
        )


def read(checkpoints: Sequence[str | Path], ema: bool = False) -> tuple[list[Tensors], list[list[str]]]:
    """Return the tensors of runs or checkpoints, or with `ema` their averaged weights, and the names of their objectives.

    Adapters (LoRA) are merged.

    Raises: ValueError if one has no valid checkpoint or no averaged weights.
    """
    found = [find(each) for each in checkpoints]
    for _, path in found:
        if ema and not store.has(path, "ema"):
            raise ValueError(f"{path} has no averaged weights; expected a run with trainer.ema_decay, or leave out ema")
    configs = [config_yaml.read(folder / "config.yaml") for folder, _ in found]
    tensors: list[Tensors] = [
        merged_as_saved(store.load_tensors(path, "ema" if ema else "model"), config)
        for (_, path), config in zip(found, configs, strict=True)
    ]
    return tensors, [list(config["objective"]) for config in configs]


def write(
    tensors: Tensors,
    checkpoints: Sequence[str | Path],
    weights: Sequence[float],
    folder: Path,
    without: Collection[str] = (),
    scales: Sequence[str] = (),
) -> Path:
    """Write a run's directory with one checkpoint, which other commands load, but no run resumes.

    Configuration, tokenizer and number of samples seen are those of the last of `checkpoints`. Objectives that another one
    lacks, or trained on other classes, are left out of the configuration.

    Args:
        tensors: the checkpoint's tensors.
        checkpoints: the runs or checkpoints that were interpolated.
        weights: weight of each of them, which run.json keeps with their names.
        folder: new directory.
        without: names of objectives to leave out.
        scales: as in `interpolate`; the first run's objective of that scale is kept.

    Returns: the checkpoint's folder.
    Raises: ValueError if the directory has checkpoints already.
    """
    if (folder / "checkpoints").exists():
        raise ValueError(f"{folder} has checkpoints already; expected a new folder: output=...")
    sources = [find(each)[0] for each in checkpoints]
    source, path = find(checkpoints[-1])
    configs = [config_yaml.read(each / "config.yaml") for each in sources]
    classes = [class_names(each) for each in sources]
    config = configs[-1]
    kept = [
        name
        for name in config["objective"]
        if name not in without
        and all(name in other["objective"] for other in configs)
        and all(of_other.get(name) == classes[-1].get(name) for of_other in classes)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    nodes = {name: config["objective"][name] for name in kept}
    if scales:
        learner = scales[0].split(".")[1]
        nodes = {learner: configs[0]["objective"][learner], **nodes}
    own = {**config, "objective": nodes}
    files.write_text(folder / "config.yaml", config_yaml.to_yaml(own))
    facts = {
        "classes": {name: names for name, names in classes[-1].items() if name in kept},
        "interpolated": [[weight, str(each)] for weight, each in zip(weights, checkpoints, strict=True)],
    }
    files.write_text(folder / "run.json", json.dumps(facts, indent=2) + "\n")
    for name in (TOKENIZER_FOLDER, HUGGINGFACE_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, symlinks=True, dirs_exist_ok=True)
    state = {"samples": store.load_state(path).get("samples", 0)}
    return store.save(folder / "checkpoints", 0, {"model": tensors, "optimizer": {}}, state, keep_last=0)
