"""Loading of a checkpoint's objectives with the weights of their heads, under the same restrictions as the model."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpretrain.checkpoints import untrusted
from mmpretrain.checkpoints.building import built, built_module, numel
from mmpretrain.config import instantiate
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Objective, check_objective, hooks_of
from mmpretrain.schedules import ScheduledValue

_MEMBERS = ("loss",)


def load_objectives(
    nodes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: ImageTextModel,
    tokenizer: Tokenizer,
    source: Path,
    trust: Sequence[str] = (),
) -> dict[str, Objective]:
    """Build the objectives of a checkpoint's configuration and load their weights. Those of weight 0 are left out.

    Args:
        nodes: the configuration's `objective`, by name.
        tensors: weights by full name, such as `objectives.mae.mask_token`.
        model: the checkpoint's model.
        tokenizer: the checkpoint's tokenizer.
        source: file of the configuration.
        trust: see `load.load_checkpoint`.

    Returns: objectives by name, in evaluation mode on the model's device.
    Raises: ValueError if a node names parts that are neither mmpretrain's nor trusted, or if the weights are those of another
        objective.
    """
    objectives: dict[str, Objective] = {}
    for name, node in nodes.items():
        if not isinstance(node, dict):
            raise ValueError(f"{source}: objective.{name} is {node!r}; expected keys with values, as the run wrote it")
        if _is_used(node, name, source):
            prefix = f"objectives.{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            arguments = {key: value for key, value in node.items() if key != "weight"}
            objectives[name] = _load(arguments, name, own, model, tokenizer, source, trust)
    return objectives


def _is_used(node: Mapping[str, Any], name: str, source: Path) -> bool:
    """Return True if an objective's weight is not always 0: training leaves out the others."""
    key = f"objective.{name}.weight"
    weight: ScheduledValue = built(key, source, lambda: ScheduledValue(node.get("weight", 1.0), key, at_least=0))
    return max(weight.values) > 0


def _load(
    node: dict[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    model: ImageTextModel,
    tokenizer: Tokenizer,
    source: Path,
    trust: Sequence[str],
) -> Any:
    key = f"objective.{name}"
    find = untrusted.lookup(untrusted.OBJECTIVES, trust, _MEMBERS)
    resolved = instantiate.resolve(node, key, find)
    largest = numel(tensors) + sum(parameter.numel() for parameter in model.parameters())
    untrusted.check_objective(node, name, largest, trust)
    takes_path = "config_path" in inspect.signature(find(node.get("_target_"), key)).parameters
    runtime = {"model": model, **({"config_path": key} if takes_path else {})}

    def build() -> Any:
        objective = instantiate.call(resolved, 0, **runtime)
        check_objective(objective, key, model)
        hooks_of(objective).set_tokenizer(tokenizer)  # may add state whose size depends on the vocabulary
        return objective

    with untrusted.offline():
        objective = built_module(f"objective {name}", build, tensors, source)
    objective.load_state_dict(tensors)
    return objective.to(model.device).eval()
