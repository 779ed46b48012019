"""Initial weights of a run from another run, a file, or a pretrained model of open_clip."""

import logging
from collections.abc import Sequence
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import find, learned_scalar, merged_as_saved
from mmpretrain.checkpoints.open_clip import from_open_clip
from mmpretrain.checkpoints.weights import published_weights, read_weights
from mmpretrain.config import config_yaml
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import has_adapters, plain_name
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)

_NAMED = 8
_IMAGE_POSITIONS = ("model.image.trunk.pos_embed", "model.image.visual.positional_embedding")


def init_from(task: Task, source: str) -> None:
    """Load initial weights into the task.

    Two kinds of mismatch are logged and ignored: weights of objectives or of a text encoder that this run does not have,
    and weights of this run's objectives and adapters that the source lacks. An objective that learns a scale and no bias,
    such as a classifier of embeddings, takes the source's `logit_scale` if the source has none under its name. Any other
    missing, additional or differently shaped weight is an error. Adapters of the source are merged. Image position
    embeddings of another grid size are interpolated.

    Args:
        task: the model and its objectives.
        source: a run or checkpoint of mmpretrain; a weights file of mmpretrain or open_clip (.safetensors, .pt, .bin); or
            `<model>/<tag>` of `open_clip.list_pretrained()`.

    Raises: ValueError if the source does not exist or its weights do not fit this model.
    """
    own = task.state_dict()
    tensors, objectives = _read(source, task)
    adapted = {plain_name(name): name for name in own}
    tensors = {adapted.get(name, name): tensor for name, tensor in tensors.items()}
    _take_scales(task, tensors, objectives)
    for name in _IMAGE_POSITIONS:
        if name in own and name in tensors and tensors[name].shape != own[name].shape:
            tensors[name] = _resized(tensors[name], own[name], task.model)
    missing = [name for name in own if name not in tensors]
    left_over = [name for name in tensors if name not in own]
    new_heads = [name for name in missing if name.startswith("objectives.") or has_adapters([name])]
    unused = [name for name in left_over if name.startswith("objectives.") or _is_of_no_tower(name, task.model)]
    problems = {
        "are missing": sorted(set(missing) - set(new_heads)),
        "are left over": sorted(set(left_over) - set(unused)),
        "have another shape": [name for name in own if name in tensors and tensors[name].shape != own[name].shape],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"init_from={source} does not fit this model: {listed}; expected the weights of the same model"
        )
    for what, names in (("starts anew", new_heads), ("is not used", unused)):
        if names:
            log.info("init_from=%s: %s: %s", source, what, _listed(names))
    task.load_state_dict({**own, **{name: tensors[name] for name in own if name in tensors}})


def _take_scales(task: Task, tensors: dict[str, Tensor], objectives: Sequence[str]) -> None:
    """Give each of the task's scales that the source lacks the first one of the source, unless it goes with a bias.

    Args:
        task: the task.
        tensors: the source's tensors, which are changed.
        objectives: names of the source's objectives in the order of its configuration, as `load_checkpoint` chooses; may be
            empty.
    """
    # Of a file, whose configuration is not known, the names alone tell the objectives.
    names = objectives or [name.split(".")[1] for name in tensors if name.startswith("objectives.")]
    learned = learned_scalar(tensors, names)
    lacking = [
        f"objectives.{name}.logit_scale"
        for name, objective in task.objectives.items()
        if hasattr(objective, "logit_scale") and not hasattr(objective, "logit_bias")
    ]
    lacking = [name for name in lacking if name not in tensors]
    if learned is not None and lacking:
        tensors.update(dict.fromkeys(lacking, tensors[learned]))
        log.info("init_from: %s begins with %s", ", ".join(lacking), learned)
        if learned not in task.state_dict():
            del tensors[learned]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _is_of_no_tower(name: str, model: ImageTextModel) -> bool:
    """Return True if a parameter belongs to an encoder that the model does not have."""
    absent = [tower for tower in ("image", "text") if getattr(model, tower) is None]
    return any(name.startswith((f"model.{tower}.", f"model.{tower}_projection.")) for tower in absent)


def _resized(positions: Tensor, own: Tensor, model: ImageTextModel) -> Tensor:
    """Interpolate position embeddings to the model's grid; those of another width are returned unchanged."""
    table = positions if positions.ndim == 3 else positions[None]
    if table.shape[-1] != own.shape[-1]:
        return positions
    image = model.image_encoder
    prefix = own.shape[-2] - image.num_patches
    resized = resample_abs_pos_embed(table, list(image.grid_size), num_prefix_tokens=prefix)
    return resized.reshape(own.shape)


def _read(source: str, task: Task) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Return the source's tensors under the task's parameter names, and the names of a run's objectives."""
    path = Path(source)
    if path.is_dir():
        try:
            folder, checkpoint = find(path)
        except ValueError as error:
            raise ValueError(f"init_from={source}: {error}") from error
        saved = config_yaml.read(folder / "config.yaml")
        return merged_as_saved(store.load_tensors(checkpoint, "model"), saved), [*(saved.get("objective") or ())]
    try:
        tensors = read_weights(path if path.is_file() else published_weights(source))
    except ValueError as error:
        raise ValueError(f"init_from={source}: {error}") from error
    if any(name.startswith(("model.", "objectives.")) for name in tensors):
        return tensors, ()
    renamed = from_open_clip(task.model, tensors)
    scalars = {name: renamed.pop(name) for name in ("logit_scale", "logit_bias") if name in renamed}
    ours = {f"model.{name}" if name in task.model.state_dict() else name: t for name, t in renamed.items()}
    for leaf, tensor in scalars.items():
        learned = [name for name in task.state_dict() if name.startswith("objectives.") and name.endswith(f".{leaf}")]
        ours |= {name: tensor.reshape(1) for name in learned or [f"objectives.{leaf}"]}
    return ours, ()
