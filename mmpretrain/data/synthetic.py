"""Stream of random data, to measure training without the cost of reading and decoding."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mmpretrain.batch import Refused, Samples
from mmpretrain.data.order import Order, SourceOrder
from mmpretrain.data.stream import StreamItem, with_text
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress
from mmpretrain.seeds import draws, hash64

_FIRST_TOKEN = 1  # 0 is padding with some tokenizers


class SyntheticStream:
    """Stream of images and token ids drawn from each sample's seed; see `mmpretrain.data.stream.Stream`.

    Args:
        name, batch_size, seed, image_size, channels: as in `mmpretrain.data.stream.SampleStream`.
        num_samples: number of samples per epoch.
        text_length: smallest and largest number of tokens per text; lengths are uniform in between.
    """

    def __init__(
        self,
        name: str,
        batch_size: Scheduled,
        seed: int,
        image_size: int,
        channels: int = 3,
        num_samples: int = 100_000,
        text_length: Sequence[int] = (8, 77),
    ) -> None:
        if len(text_length) != 2 or not 2 <= text_length[0] <= text_length[1]:
            raise ValueError(f"text_length is {list(text_length)}; expected two numbers with 2 <= smallest <= largest")
        self.name = name
        self.prefetch_samples = 0
        self.batch_size = ScheduledValue(batch_size, f"data.train.{name}.batch_size", in_stages=True, at_least=1)
        self.order = Order([SourceOrder(hash64(seed, name, "synthetic"), num_samples)], [1.0])
        self.fingerprints = {"synthetic": f"{num_samples} samples, texts of {list(text_length)} tokens"}
        self._seed = hash64(seed, name)
        self._shape = (image_size, image_size, channels)
        self._text_length = tuple(text_length)

    def prefetch(self, item: StreamItem, is_urgent: bool) -> None:
        """Do nothing; no sample is stored."""

    def check_first_sample(self) -> None:
        """Do nothing; every sample is valid."""

    def sample_key(self, position: int) -> str:
        """Return a name for the sample at `position`."""
        return f"synthetic:{int(self.order(np.array([position]))[1][0])}"

    def read(self, item: StreamItem, tokenizer: Tokenizer, progress: TrainingProgress) -> tuple[Samples, list[Refused]]:
        """Return the stream's part of one micro-batch; no sample is refused."""
        positions, _, ids = item
        seeds = draws(np.uint64(self._seed), positions)
        num_bytes = math.prod(self._shape)
        words = draws(seeds[:, None], np.arange(-(-num_bytes // 8)))
        images = words.view(np.uint8)[:, :num_bytes].reshape(len(ids), *self._shape)
        shortest, longest = self._text_length
        lengths = shortest + seeds % np.uint64(longest - shortest + 1)
        lengths = np.minimum(lengths.astype(np.int64), tokenizer.context_length)
        salted = draws(seeds, hash64("text"))
        tokens = draws(salted[:, None], np.arange(int(lengths.max()))) % np.uint64(tokenizer.vocab_size - _FIRST_TOKEN)
        text = tokens.astype(np.int64) + _FIRST_TOKEN
        samples = Samples(
            positions=torch.from_numpy(positions.copy()),
            ids=torch.from_numpy(ids.copy()),
            seeds=torch.from_numpy(seeds.view(np.int64)),
        )
        samples = with_text(samples, torch.from_numpy(text), torch.from_numpy(lengths), tokenizer)
        return replace(samples, images=torch.from_numpy(images).permute(0, 3, 1, 2)), []
