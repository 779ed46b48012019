"""Similarity of the patches of an image to each word of a text."""

import re

import numpy as np
import torch
from torch import Tensor

from mmpretrain.evals.base import Context
from mmpretrain.evals.patch_similarity import patch_embeddings

_MAX_WORDS = 32


def words_of(text: str) -> list[str]:
    """Return the distinct words of a text, without punctuation, in their order.

    Raises: ValueError if there is none, or more than 32.
    """
    words = list(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", text)))
    if not 1 <= len(words) <= _MAX_WORDS:
        raise ValueError(f"the text has {len(words)} distinct words; expected 1 to {_MAX_WORDS}")
    return words


@torch.no_grad()
def word_maps(image: Tensor, text: str, context: Context) -> list[tuple[str, np.ndarray]]:
    """Compare the patches of an image with a text and with each of its words, embedded as a text of its own.

    Args:
        image: the image as preprocessed, uint8 [c, h, w].
        text: the text.
        context: a model whose patches can be embedded (`evals.patch_similarity.embeds_patches`).

    Returns: (text or word, cosines float32 [rows, columns]): first the text if it has several words, then each word.
    Raises: errors of `words_of`.
    """
    words = words_of(text)
    texts = words if words == [text.strip()] else [text.strip(), *words]
    embedded = context.embedded_texts(texts)
    with context.autocast:
        patches = patch_embeddings(context.model, image[None])[0]
    return [(each, (patches @ row).cpu().numpy()) for each, row in zip(texts, embedded, strict=True)]
