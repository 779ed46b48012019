"""States of an encoder's layers, one row for each image or text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.models.encoders import ImageEncoder, TextEncoder
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.layers import blocks_of

_Hook = Callable[[nn.Module, Any, Any], None]


def image_layers(model: ImageTextModel, images: Tensor) -> list[Tensor]:
    """Return the states after each block of the image encoder, and the pooled states last, float32 [b, d] each.

    A block's states are averaged over all of its tokens, class and register tokens included, or over all positions of a
    feature map.

    Args:
        model: the model, in evaluation mode.
        images: images, uint8 [b, c, h, w].
    """
    encoder = model.image_encoder
    has_channels_last = getattr(getattr(encoder, "trunk", None), "output_fmt", "NCHW") == "NHWC"  # of a model of timm
    states, encoding = _states(encoder, "model.image", lambda: model.encode_image(images))
    rows = []
    for each in states:
        if each.ndim == 4 and not has_channels_last:
            each = each.movedim(1, -1)
        rows.append(each.flatten(1, -2).mean(1) if each.ndim > 2 else each)
    return [*rows, encoding.pooled.float()]


def text_layers(model: ImageTextModel, ids: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return the states after each block of the text encoder, averaged over a text's tokens, and the pooled states last.

    Args:
        model: the model, in evaluation mode.
        ids: token ids, int64 [b, L].
        lengths: numbers of tokens, int64 [b].
    """
    states, encoding = _states(model.text_encoder, "model.text", lambda: model.encode_text(ids, lengths))
    rows = []
    for each in states:
        is_token = torch.arange(each.shape[1], device=each.device) < lengths[:, None]
        rows.append(each.where(is_token[..., None], 0).sum(1) / lengths[:, None])
    return [*rows, encoding.pooled.float()]


def _states(
    encoder: ImageEncoder | TextEncoder, key: str, encode: Callable[[], Encoding]
) -> tuple[list[Tensor], Encoding]:
    """Return the outputs of an encoder's blocks, float32, in their order, and its encoding."""
    blocks = blocks_of(encoder, key)
    states: dict[str, Tensor] = {}
    with _hooked(blocks, states):
        encoding = encode()
        _ = encoding.tokens  # runs the last block on all tokens; pooling may run it on one of them
    if missing := [name for name in blocks if name not in states]:
        raise ValueError(
            f"{key}: {missing[0]} of {type(encoder).__name__} is not called; expected one call of each block"
        )
    return [states[name] for name in blocks], encoding


@contextmanager
def _hooked(blocks: dict[str, nn.Module], states: dict[str, Tensor]) -> Iterator[None]:
    """Write the outputs of blocks to `states` inside the block of this context."""

    def hook(name: str) -> _Hook:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            states[name] = (output[0] if isinstance(output, tuple) else output).float()

        return keep

    handles = [block.register_forward_hook(hook(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
