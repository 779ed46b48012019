"""Low-rank adaptation of a model's linear layers: LoRA (Hu et al. 2022), with the adapters of `peft`."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from mmpretrain.errors import UsageError, check_number
from mmpretrain.models.image_text import ImageTextModel

_ADAPTERS = (".lora_A.default.weight", ".lora_B.default.weight")
_BASE = ".base_layer."


def add_adapters(
    model: ImageTextModel, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = ("*",)
) -> None:
    """Add an adapter to each linear layer of the encoders whose name matches one of `targets`, in place.

    A layer W x + b becomes W x + b + (alpha / rank) B A x, with A [rank, in] and B [out, rank] (equation 3); B begins with
    zeros. The encoders' own parameters no longer require a gradient; the projections into the shared space do.

    Args:
        model: the model.
        rank: rank of the adapters.
        alpha: numerator of their scale.
        dropout: probability of dropping an input of an adapter.
        targets: patterns of the layers' names within the model, such as `image.*` or `*.mlp.*`.

    Raises: UsageError if `peft` is not installed, a number is out of range, or no layer matches.
    """
    check_number("trainer.lora.rank", rank, at_least=1)
    check_number("trainer.lora.alpha", alpha, above=0)
    check_number("trainer.lora.dropout", dropout, at_least=0, below=1)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("peft is not installed; pip install 'multimodal-pretrain[lora]'") from error
    # Subclasses may be read without being called, as nn.MultiheadAttention reads its output projection.
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    linear = [name for name in linear if name.startswith(("image.", "text."))]
    matching = [name for name in linear if any(fnmatchcase(name, target) for target in targets)]
    if not matching:
        known = ", ".join(linear[:4]) or "none"
        raise UsageError(
            f"trainer.lora.targets is {list(targets)}; expected patterns of linear layers, such as {known}"
        )
    for tower in ("image", "text"):
        if (encoder := getattr(model, tower)) is None:
            continue
        encoder.requires_grad_(False)
        names = [name.removeprefix(f"{tower}.") for name in matching if name.startswith(f"{tower}.")]
        if names:
            # peft compares an expression with whole names, but a list also with their ends.
            whole = "|".join(map(re.escape, names))
            config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=whole)  # type: ignore[arg-type]
            inject_adapter_in_model(config, encoder)


def plain_name(name: str) -> str:
    """Return the name that a parameter has in a model without adapters."""
    return name.replace(_BASE, ".")


def merge_adapters(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return weights without adapters: W + (alpha / rank) B A takes the place of each adapted W.

    Args:
        tensors: weights by name; those without adapters are returned as they are.
        alpha: as in `add_adapters`; the rank is that of the adapters.

    Raises: ValueError if half of an adapter is missing, or its shape is not that of its layer.
    """
    merged = {plain_name(name): tensor for name, tensor in tensors.items() if not name.endswith(_ADAPTERS)}
    for name in [name.removesuffix(_ADAPTERS[0]) for name in tensors if name.endswith(_ADAPTERS[0])]:
        down, up, weight = (tensors.get(f"{name}{end}") for end in (*_ADAPTERS, ".base_layer.weight"))
        if down is None or up is None or weight is None or (len(up), down.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"the adapter of {name} does not fit its layer; expected the weights as the run wrote them"
            )
        product = up.double() @ down.double() * (alpha / len(down))
        merged[f"{name}.weight"] = (weight.double() + product).to(weight.dtype)
    return merged


def has_adapters(names: Sequence[str] | Mapping[str, object]) -> bool:
    """Return True if some of these names of weights are adapters'."""
    return any(name.endswith(_ADAPTERS) for name in names)
