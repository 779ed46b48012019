"""Interfaces of image and text encoders, and the defaults of the attributes that an encoder may leave out."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor, nn

from mmpretrain.batch import Packing
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.masking import PatchMask


class ImageEncoder(Protocol):
    """Interface of image encoders. `image_size` and `width` are required, and for a plain ViT the last four attributes."""

    image_size: int
    """Side of the images in pixels."""
    width: int
    """d, width of the pooled states."""
    projects: bool
    """True if the encoder has a projection of its own, `project`. Default: False; the model adds a linear one."""
    has_batch_norm: bool
    """True if samples of a batch affect each other through BatchNorm. Default: True if a module is a BatchNorm."""
    is_vit: bool
    """True for a plain ViT that accepts patch masks, which the four attributes below describe. Default: False."""
    num_prefix_tokens: int
    """P, number of class and register tokens."""
    num_patches: int
    """N, number of patches of an image."""
    grid_size: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: tuple[int, int]
    """Height and width of a patch in pixels."""

    def __call__(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode normalised images [b, c, h, w]. `mask` is None unless `is_vit` is True."""
        ...

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to the shared space [b, e]; only called if `projects` is True."""
        ...


class TextEncoder(Protocol):
    """Interface of text encoders. The first five attributes are required; the others have defaults."""

    vocab_size: int
    """Number of token ids; at least the tokenizer's."""
    context_length: int
    """Largest number of tokens of a text, start and end included."""
    width: int
    """d, width of the token states and of the pooled states."""
    causal: bool
    """True if a token's state depends only on the token itself and the tokens before it."""
    token_embeddings: Tensor
    """Token embedding matrix, [vocabulary, d]."""
    projects: bool
    """True if the encoder has a projection of its own, `project`. Default: False; the model adds a linear one."""
    pad_id: int | None
    """Padding token id, if padding affects the output. Default: None."""
    adopts_padding: bool
    """True if `pad_id` can be set to the tokenizer's, because the encoder does not depend on a particular id. Default:
    False."""
    end_id: int | None
    """Id of the token whose state is pooled. Default: None, pooling does not depend on a token id."""

    def __call__(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids int64 [b, L] of texts with `lengths` int64 [b]; the ids beyond a text's length are padding.

        `packing` may be ignored; it places several texts in a row to save computation (see `models.rows`).
        """
        ...

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to the shared space [b, e]; only called if `projects` is True."""
        ...


_OF_VIT = {
    "num_prefix_tokens": "the number of class and register tokens",
    "num_patches": "the number of patches of an image",
    "grid_size": "the rows and columns of patches",
    "patch_size": "the height and width of a patch in pixels",
}
_WRAP = ", or a module that mmpretrain.models.module_encoder.ModuleEncoder wraps"


def complete_image_encoder(encoder: Any) -> None:
    """Set the attributes of `ImageEncoder` that an image encoder leaves out to their defaults.

    Raises: ValueError if it is no module, a required attribute is missing, or a public name resembles an attribute that is
        left out.
    """
    _check_module(encoder, "model.image")
    required = {
        "image_size": f"the side of its images in pixels{_WRAP}",
        "width": f"the width of its pooled states{_WRAP}",
        **(_OF_VIT if getattr(encoder, "is_vit", False) else {}),
    }
    norms = {} if hasattr(encoder, "has_batch_norm") else {"has_batch_norm": has_batch_norm(encoder)}
    _complete(encoder, "model.image", ("images", "mask"), required, {"projects": False, "is_vit": False, **norms})


def complete_text_encoder(encoder: Any) -> None:
    """Set the attributes of `TextEncoder` that a text encoder leaves out to their defaults.

    Raises: ValueError if it is no module, a required attribute is missing, or a public name resembles an attribute that is
        left out.
    """
    _check_module(encoder, "model.text")
    required = {
        "vocab_size": "the number of its token ids",
        "context_length": "the largest number of tokens of a text",
        "width": "the width of its token states",
        "causal": "whether a token's state depends only on tokens up to it",
        "token_embeddings": "its token embedding matrix, [vocabulary, d]",
    }
    defaults = {"projects": False, "pad_id": None, "adopts_padding": False, "end_id": None}
    _complete(encoder, "model.text", ("ids", "lengths", "packing"), required, defaults)


def has_batch_norm(module: nn.Module) -> bool:
    """Return True if a module or one of its submodules is a BatchNorm."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())


def _check_module(encoder: object, key: str) -> None:
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{key} is a {type(encoder).__name__}; expected a torch.nn.Module")


def _complete(
    encoder: Any, key: str, inputs: Sequence[str], required: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    kind = type(encoder).__name__
    if not hasattr(encoder, "projects") and hasattr(type(encoder), "project"):
        raise ValueError(f"{key}: {kind} has a method project, which is never called; set {kind}.projects = True")
    classes = [each for each in type(encoder).__mro__ if each.__module__.partition(".")[0] != "torch"]
    own = {name for each in [*classes, encoder] for name in vars(each) if not name.startswith("_")}
    for name in [name for name in (*required, *defaults) if not hasattr(encoder, name)]:
        misspelt = get_close_matches(name, own - {*required, *defaults}, n=1, cutoff=0.8)
        if misspelt:
            raise ValueError(f"{key}: {kind}.{misspelt[0]} is no attribute of an encoder; did you mean {name}?")
        if name in required:
            raise ValueError(f"{key}: {kind} has no attribute {name}; expected {required[name]}")
        setattr(encoder, name, defaults[name])
    for name in [name for name in ("image_size", "width", "vocab_size", "context_length") if name in required]:
        if not isinstance(getattr(encoder, name), int):
            raise ValueError(f"{key}: {kind}.{name} is {getattr(encoder, name)!r}; expected a whole number")
    try:
        inspect.signature(encoder.forward).bind(*inputs)
    except TypeError as error:
        raise ValueError(
            f"{key}: {kind}.forward{inspect.signature(encoder.forward)} cannot be called with {', '.join(inputs)} ({error}); "
            f"expected forward({', '.join([*inputs[:-1], f'{inputs[-1]}=None'])})"
        ) from error


def check_encoding(encoding: object, encoder: Any, key: str, count: int) -> None:
    """Check what an encoder returned for `count` samples.

    Raises: ValueError unless it is an `Encoding` whose pooled states are [count, width]; encoders that project their states
        themselves may have another width.
    """
    if not isinstance(encoding, Encoding):
        raise ValueError(
            f"{key}: forward returned a {type(encoding).__name__}; expected an mmpretrain.models.encoding.Encoding"
            + (_WRAP if key == "model.image" else "")
        )
    shape, expected = list(encoding.pooled.shape), [count, encoder.width]
    if shape != expected and not (encoder.projects and shape[:1] == [count]):
        raise ValueError(f"{key}: pooled states of {count} samples are {shape}; expected {expected}, as width says")
