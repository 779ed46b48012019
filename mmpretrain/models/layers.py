"""Layers of the towers, for layer-wise learning rates and for optimisers that treat hidden matrices in their own way."""

import re
from collections.abc import Mapping
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

_STEM = r"(?:embeddings|wte|wpe|embed_tokens|patch_embed|cls_token|pos_embed|embed_positions)\b"
_BLOCKS = r"(?:encoder\.|decoder\.)?(?:layers|layer|blocks|h)\.(\d+)\."
_NORM = r"(?:ln_f|norm|layernorm|final_layer_norm|post_layernorm)\."
_LAST_BLOCK = (99999,)  # timm's sign that a group belongs to the block before it


def layers_above(model: nn.Module, tower: str) -> dict[str, int]:
    """Return the number of layers above each parameter of a tower, by its name in the task.

    It is 0 after the last block, 1 in the last of L blocks and the final norm, and L + 1 in the stem (patch or token
    embedding, positions).

    Args:
        model: the model.
        tower: `image` or `text`.

    Raises: ValueError if the encoder has no method `layers_above`, or it leaves out a parameter.
    """
    encoder: Any = getattr(model, tower)
    if not hasattr(encoder, "layers_above"):
        raise ValueError(
            f"model.{tower} is a {type(encoder).__name__}, which does not tell its layers (for layer_decay or muon); "
            "expected a method layers_above that returns the number of layers above each of its parameters, by name"
        )
    above: Mapping[str, int] = encoder.layers_above()
    if missing := [name for name, _ in encoder.named_parameters() if name not in above]:
        raise ValueError(f"{type(encoder).__name__}.layers_above() leaves out {missing[0]}; expected every parameter")
    return {f"model.{tower}.{name}": number for name, number in above.items()}


def count_layers_above(module: nn.Module, matcher: Any) -> dict[str, int]:
    """Return the number of layers above each parameter of a module, by its name in the module.

    Args:
        module: the module.
        matcher: its parameters by layer, as `group_matcher(coarse=False)` of timm's models returns it.
    """
    names = [name for name, _ in module.named_parameters()]
    # No pattern matches the empty name, which thus lies behind the last block.
    layer_of: Mapping[str, int] = group_with_matcher(((name, None) for name in [*names, ""]), matcher, reverse=True)
    return {name: layer_of[""] - layer_of[name] for name in names}


def layers_above_blocks(module: nn.Module, stem: str, blocks: str, norm: str | None = None) -> dict[str, int]:
    """Return the number of layers above each parameter of a module that is a stem and blocks, by its name in the module.

    Args:
        module: the module.
        stem: regular expression that matches the names of the stem's parameters from their start.
        blocks: the same of the blocks' parameters, with a group for each number in a block's index.
        norm: the same of what belongs to the last block, such as the final norm; None: nothing.
    """
    of_blocks = [(blocks, None), *([(norm, _LAST_BLOCK)] if norm else [])]
    return count_layers_above(module, {"stem": stem, "blocks": of_blocks})


def layers_above_by_name(module: nn.Module) -> dict[str, int]:
    """Return the number of layers above each parameter of a transformer that names its parts as Hugging Face's do.

    Raises: ValueError if no parameter has the name of one in a block, such as `encoder.layer.0.`, `h.0.` or `layers.0.`.
    """
    if not any(re.match(_BLOCKS, name) for name, _ in module.named_parameters()):
        raise ValueError(
            f"{type(module).__name__} has no blocks named layers, layer, blocks or h (for layer_decay or muon); expected a "
            "method layers_above that returns the number of layers above each of its parameters, by name"
        )
    return layers_above_blocks(module, stem=_STEM, blocks=_BLOCKS, norm=_NORM)


def blocks_of(encoder: Any, key: str) -> dict[str, nn.Module]:
    """Return the blocks of an encoder by name, from the first to the last.

    A block is the largest module that has parameters of its layer alone, by the encoder's own `layers_above`.

    Args:
        encoder: an image or text encoder.
        key: name of the encoder in messages.

    Raises: ValueError if the encoder does not tell its layers, or has none.
    """
    if not hasattr(encoder, "layers_above"):
        raise ValueError(
            f"{key} is a {type(encoder).__name__}, which does not tell its layers; expected a method layers_above that "
            "returns the number of layers above each of its parameters, by name"
        )
    above: Mapping[str, int] = encoder.layers_above()
    found: dict[int, tuple[tuple[int, bool, int], str, nn.Module]] = {}
    for name, module in encoder.named_modules():
        # Containers are not called: an encoder calls what they hold.
        if not name or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        numbers = [above[f"{name}.{parameter}"] for parameter, _ in module.named_parameters()]
        if len(set(numbers)) == 1:
            size = (len(numbers), not isinstance(module, nn.Sequential), -len(name))
            if numbers[0] not in found or size > found[numbers[0]][0]:
                found[numbers[0]] = size, name, module
    stem = max(above.values(), default=0)
    blocks = {found[number][1]: found[number][2] for number in sorted(found, reverse=True) if 0 < number < stem}
    if not blocks:
        raise ValueError(f"{key} is a {type(encoder).__name__} without blocks; expected at least one")
    return blocks
