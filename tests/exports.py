"""Small models with random weights, as `load_checkpoint` returns them, and a photograph."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from mmpretrain.checkpoints.loaded import Loaded, fit_tokenizer, preprocess_of
from mmpretrain.data.tokenizer import ClipTokenizer, Tokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer
from mmpretrain.models.vit import TimmEncoder
from tests import tiny

CONTEXT_LENGTH = 12
TEXTS = ["a red circle", "Two dogs, 1 cat &  a bird's nest…", "naïve façade № 7", "word " * 20]


def clip_vit(name: str = "vit_base_patch16_clip_224", **args: Any) -> TimmEncoder:
    """A ViT of two blocks with a norm before them."""
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return TimmEncoder(name, 32, {**shape, **args})


def clip_text(**args: Any) -> TextTransformer:
    """A text tower for CLIP's tokenizer."""
    shape = {"context_length": CONTEXT_LENGTH, "width": 24, "depth": 2, "num_heads": 3}
    return TextTransformer(**{**shape, **args})


def loaded(
    model: ImageTextModel, tokenizer: Tokenizer | None = None, scalars: Mapping[str, float] | None = None
) -> Loaded:
    """A model, whose weights are moved away from their initial values, with its tokenizer."""
    tokenizer = tokenizer or ClipTokenizer(77 if model.text is None else model.text.context_length)
    if model.text is not None:
        fit_tokenizer(tokenizer, model.text)
    return unchanged(tiny.randomize(model), {"logit_scale": 20.0} if scalars is None else scalars, {}, tokenizer)


def unchanged(
    model: ImageTextModel, scalars: Mapping[str, float], node: Mapping[str, Any] | None = None, tokenizer: Any = None
) -> Loaded:
    """A model with its weights as they are, the node that it was built from and its tokenizer, or one of its vocabulary."""
    words = SimpleNamespace(vocab_size=model.text.vocab_size, end_id=model.text.vocab_size - 1) if model.text else None
    return Loaded(model, preprocess_of(model), tokenizer or words, scalars, {"model": dict(node or {})}, Path("run"))


def photograph() -> Image.Image:
    """A photograph of 640 x 427 pixels."""
    return Image.fromarray(load_sample_image("china.jpg"))


def pixels(of: Loaded) -> torch.Tensor:
    """The photograph as the model's normalised input."""
    assert of.preprocess is not None
    return of.model.normalize(of.preprocess(photograph())[None])
