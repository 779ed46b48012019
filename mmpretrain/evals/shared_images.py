"""Reading of the images of a data set, or of variants of them, by the ranks together."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.image_batches import ImageBatch, Read, image_batches, split
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.evals.base import Context
from mmpretrain.evals.embeddings import EvalSet, num_batches


@dataclass(frozen=True)
class ReadSamples:
    """Function for `shared_images` that reads images of a data set: item i is the image of `samples[i]`."""

    data: EvalSet
    samples: Sequence[int]

    def __call__(self, item: int, out: Tensor) -> None:
        """Write the preprocessed image of an item to `out`, uint8 [c, h, w]. Raises: BadSample."""
        assert self.data.preprocess is not None
        self.data.preprocess(self.data.shards.read(self.samples[item], IMAGE_EXTENSIONS), out)


def shared_images(
    context: Context, preprocess: Preprocess, read: Read, count: int
) -> Generator[ImageBatch, None, None]:
    """Read this rank's contiguous share of `count` items in batches. A collective, as `check_stop` is.

    Args:
        context: input of the evaluator, with the size of a batch and the number of workers.
        preprocess: preprocessing of the images.
        read: function that writes the image of an item and returns its other values.
        count: number of items of all ranks.

    Returns: generator of batches; close it if it is not read to its end.
    Raises: ValueError if an item cannot be read: the samples of `context.embedded` could be.
    """
    share = range(count)[distributed.share(count)]
    batches = split(share, context.batch_size)
    channels, size = preprocess.channels, preprocess.image_size
    with closing(image_batches(read, batches, channels, size, context.workers, context.timeout_seconds)) as loaded:
        for _ in range(num_batches(count, context.batch_size)):
            context.check_stop()
            if (batch := next(loaded, None)) is None:
                continue
            if batch.refused:
                raise ValueError(f"an image of the data set can no longer be read: {batch.refused[0][1]}")
            yield batch
