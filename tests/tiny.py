"""Models of a few thousand parameters and batches that fit them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mmpretrain.batch import Batch, Samples
from mmpretrain.data.packing import packed, row_length
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer
from mmpretrain.models.vit import TimmEncoder

IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = 16
WIDTH = 24
VOCAB_SIZE = 60
CONTEXT_LENGTH = 32

Module = TypeVar("Module", bound=nn.Module)


def randomize(module: Module) -> Module:
    """Move every parameter away from its initial value, so that no zero, one or symmetry hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def vit(image_size: int = IMAGE_SIZE, **args: Any) -> TimmEncoder:
    """A ViT of two blocks; `args` go to timm."""
    shape = {"patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    return randomize(TimmEncoder("vit_tiny_patch16_224", image_size, {**shape, **args}))


def text(**args: Any) -> TextTransformer:
    """A text transformer of two blocks."""
    shape = {"vocab_size": VOCAB_SIZE, "context_length": CONTEXT_LENGTH, "width": WIDTH, "depth": 2, "num_heads": 2}
    return randomize(TextTransformer(**{**shape, **args}))


def image_text(vocab_size: int = VOCAB_SIZE, **vit_args: Any) -> ImageTextModel:
    """Both, joined in a space of 12 dimensions."""
    return randomize(ImageTextModel(vit(**vit_args), text(vocab_size=vocab_size), embed_dim=12))


def batch(lengths: Sequence[int], seed: int = 0) -> Batch:
    """One micro-batch of stream `pairs`: noise images, and random tokens of the given lengths in order."""
    generator = torch.Generator().manual_seed(seed)
    b = len(lengths)
    sizes = torch.tensor(lengths)
    length = row_length(sizes, CONTEXT_LENGTH)
    ids = torch.randint(1, VOCAB_SIZE, (b, length), generator=generator)
    samples = Samples(
        positions=torch.arange(b),
        ids=torch.arange(b),
        seeds=torch.randint(-(1 << 62), 1 << 62, (b,), generator=generator),
        images=torch.randint(0, 256, (b, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8),
        text=ids * (torch.arange(length) < sizes[:, None]),
        lengths=sizes,
        packing=packed(sizes, length),
    )
    return Batch({"pairs": samples})
