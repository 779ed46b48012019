"""Batches of noise, laid out in memory like those of the loader."""

from dataclasses import replace

import torch

from mmpretrain import distributed
from mmpretrain.batch import Batch, Samples
from mmpretrain.data.packing import packed, row_length
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.seeds import torch_draws


def noise(model: ImageTextModel, batch_size: int, shortest: int, longest: int, seed: int = 0) -> Samples:
    """Return images of the model's size and captions of `shortest` to `longest` tokens, including start and end.

    The end token has the last id of the vocabulary, like CLIP's, and zeros follow it.
    """
    assert model.text is not None
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = model.image_encoder.image_size, model.text_encoder.vocab_size
    images = torch.randint(256, (batch_size, size, size, 3), generator=generator, dtype=torch.uint8)
    text = torch.randint(1, vocabulary - 2, (batch_size, longest), generator=generator)
    lengths = torch.randint(shortest, longest + 1, (batch_size,), generator=generator)
    text[:, 0] = vocabulary - 2
    text[torch.arange(batch_size), lengths - 1] = vocabulary - 1
    text *= torch.arange(longest) < lengths[:, None]
    ids = torch.arange(seed * batch_size, (seed + 1) * batch_size)
    seeds = torch_draws(torch.tensor([seed]), batch_size)[0]
    return Samples(ids, ids, seeds, images.permute(0, 3, 1, 2), text, lengths)


def my_batches(samples: Samples, micro_batch_size: int | None = None) -> list[Batch]:
    """Return this rank's micro-batches of a batch with packed texts, as the loader packs them; None: a single micro-batch."""
    assert samples.lengths is not None and samples.text is not None
    mine = torch.arange(len(samples)).chunk(distributed.world_size())[distributed.rank()]
    batches = []
    for rows in mine.split(micro_batch_size or len(mine)):
        some = samples.rows(rows)
        assert some.text is not None and some.lengths is not None
        length = row_length(some.lengths, some.text.shape[1])
        packing = packed(some.lengths, length)
        batches.append(Batch({"pairs": replace(some, text=some.text[:, :length], packing=packing)}))
    return batches
