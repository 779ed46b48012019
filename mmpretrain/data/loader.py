"""From positions to batches: a map-style data set whose items are whole micro-batches of one rank.

The order decides what a micro-batch holds; workers only decide who decodes it. A `DataLoader` hands items out
in order, so what was prefetched and not consumed is simply dropped at a kill.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmpretrain.batch import Batch, Refused, Samples
from mmpretrain.data.decode import (
    BadSample,
    check_caption_field,
    decode_captions,
    decode_image,
)
from mmpretrain.data.order import Order, SourceOrder, step_positions
from mmpretrain.data.shards import Shards
from mmpretrain.data.storage import LocalStorage, Storage
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.data.transforms import Transform
from mmpretrain.seeds import draw, draws, hash64

_MAX_REPLACEMENTS = 20
_LENGTH_MULTIPLE = 8

StreamItem = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(positions, sources, sample ids) of one micro-batch, int64 [b] each."""


@dataclass(frozen=True)
class Source:
    """One set of tars of a stream, with the weight it is drawn with (None: all sources are one data set)."""

    name: str
    shards: Shards
    weight: float | None = None


def read_member(shards: Shards, storage: Storage, sample_id: int, extensions: Sequence[str]) -> bytes:
    """The bytes of a sample's first member among `extensions`.

    Raises: BadSample if it has none of them.
    """
    member = shards.member(sample_id, extensions)
    if member is None:
        raise BadSample(f"it has no member {' or '.join(extensions)}")
    path, _, offset, size = member
    return storage.read(path, offset, size)


def read_captions(shards: Shards, storage: Storage, sample_id: int, field: str) -> list[str]:
    """The captions under `field` (`txt` or `json.<path>`). Raises: BadSample if there are none."""
    return decode_captions(read_member(shards, storage, sample_id, (field.split(".")[0],)), field)


class Stream:
    """One stream of samples: its sources, their order, and what is read of each sample.

    Args:
        name: the stream's name, part of every seed.
        sources: where the samples lie.
        batch_size: samples of a step, over all ranks.
        seed: the run's seed.
        caption: the caption's field, `txt` or `json.<path>`; None for a stream without text.
        transform: which part of the image is seen; None for a stream without images.
        image_size: the side of the images, in pixels.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        batch_size: int,
        seed: int,
        caption: str | None,
        transform: Transform | None,
        image_size: int,
    ) -> None:
        weights = [source.weight for source in sources]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"data.train.{name}.sources have weights {weights}; give every source a weight, or none")
        if transform is None and caption is None:
            raise ValueError(f"data.train.{name} has neither a caption nor a transform; name at least one")
        if caption is not None:
            check_caption_field(caption, f"data.train.{name}.caption")
        self.name = name
        self.batch_size = batch_size
        self.sources = list(sources)
        if None in weights and len(sources) > 1:
            # Sources without weights are one data set: each sample is seen once an epoch.
            paths = [source.shards.path(i) for source in sources for i in range(len(source.shards.counts))]
            self.sources = [Source("+".join(source.name for source in sources), Shards(paths))]
        self.order = Order(
            [SourceOrder(hash64(seed, name, source.name), source.shards.num_samples) for source in self.sources],
            [1.0 if source.weight is None else source.weight for source in self.sources],
        )
        self.fingerprints = {source.name: source.shards.fingerprint for source in self.sources}
        self._seed = hash64(seed, name)
        self._caption = caption
        self._transform = transform
        self._image_size = image_size
        sizes = [source.shards.num_samples for source in self.sources]
        self._first_id = np.cumsum([0, *sizes[:-1]])
        self._storage: Storage = LocalStorage()

    def check_first_sample(self) -> None:
        """Decode one sample of each source, so that a wrong field ends the run at its start.

        A bad first sample proves nothing, so as many are tried as would be in training.
        Raises: ValueError naming what is wrong with the first one, and how to mend it.
        """
        fix = "mend the shards"
        if self._caption is not None:
            fix = f"set data.train.{self.name}.caption to `txt` or a field `json.<name>` that it has, or {fix}"
        for source in self.sources:
            shards = source.shards
            reasons: list[str] = []
            for sample in range(min(_MAX_REPLACEMENTS, shards.num_samples)):
                try:
                    self._decode(shards, sample, seed=0)
                    break
                except BadSample as error:
                    reasons.append(str(error))
            else:
                raise ValueError(
                    f"data.train.{self.name}: none of the first {len(reasons)} samples of {shards.path(0)} can be used; "
                    f"of the first (key {shards.key(0)!r}): {reasons[0]}; {fix}"
                )

    def sample_key(self, position: int) -> str:
        """The shard and key of the sample that stands at `position`."""
        sources, samples = self.order(np.array([position]))
        shards = self.sources[int(sources[0])].shards
        return f"{shards.path(int(shards.locate(samples)[0][0]))}:{shards.key(int(samples[0]))}"

    def _decode(self, shards: Shards, sample: int, seed: int) -> tuple[Tensor | None, str | None]:
        image = caption = None
        if self._caption is not None:
            captions = read_captions(shards, self._storage, sample, self._caption)
            caption = captions[draw(hash64(seed, "caption"), 0) % len(captions)]
        if (transform := self._transform) is not None:
            data = read_member(shards, self._storage, sample, IMAGE_EXTENSIONS)
            image = decode_image(data, lambda height, width: transform(height, width, seed), self._image_size)
        return image, caption

    def read(self, item: StreamItem, tokenizer: Tokenizer, text_groups: int) -> tuple[Samples, list[Refused]]:
        """Decode one micro-batch's part of this stream; a bad sample is replaced by a pure function of its position.

        Raises: OSError for an I/O error; ValueError if some position finds no usable sample.
        """
        positions, sources, ids = item
        seeds = draws(np.uint64(self._seed), positions)
        refused: list[Refused] = []
        images: list[Tensor] = []
        captions: list[str] = []
        used = np.empty(len(positions), dtype=np.int64)
        for row, (source, first, seed) in enumerate(zip(sources.tolist(), ids.tolist(), seeds.tolist(), strict=True)):
            shards, sample = self.sources[source].shards, first
            for attempt in range(_MAX_REPLACEMENTS):
                try:
                    image, caption = self._decode(shards, sample, seed)
                    break
                except BadSample as error:
                    shard = shards.path(int(shards.locate(np.array([sample]))[0][0]))
                    refused.append(Refused(self.name, shard, shards.key(sample), str(error)))
                    sample = draw(hash64(seed, "replacement"), attempt) % shards.num_samples
            else:
                raise ValueError(
                    f"{_MAX_REPLACEMENTS} samples in a row of {self.sources[source].name!r} cannot be used, the last "
                    f"for: {refused[-1].reason}; look at quarantine.jsonl and mend the data"
                )
            used[row] = self._first_id[source] + sample
            if image is not None:
                images.append(image)
            if caption is not None:
                captions.append(caption)
        samples = Samples(
            positions=torch.from_numpy(positions.copy()),
            ids=torch.from_numpy(used),
            seeds=torch.from_numpy(seeds.view(np.int64)),
            # Stacked as decoders leave them, channels last: another layout would cost a transposition of every image.
            images=torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2) if images else None,
        )
        return (with_text(samples, captions, tokenizer, text_groups) if captions else samples), refused


def length_cuts(lengths: Tensor, text_groups: int, longest: int) -> tuple[int, ...]:
    """What each of `text_groups` equal slices of sorted lengths int64 [b] is cut to: its longest, rounded up to 8."""
    return tuple(
        min(-(-int(part.max()) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, longest)
        for part in lengths.tensor_split(min(text_groups, len(lengths)))
    )


def _select(images: Tensor, rows: Tensor) -> Tensor:
    """images[rows], channels last as they are, by copying whole rows of memory."""
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def with_text(samples: Samples, captions: Sequence[str], tokenizer: Tokenizer, text_groups: int) -> Samples:
    """`samples` with their captions' tokens, the rows sorted by length for `models.text.by_length`."""
    text, lengths = tokenizer(captions)
    by_length = torch.argsort(lengths, stable=True)
    lengths = lengths[by_length]
    cuts = length_cuts(lengths, text_groups, tokenizer.context_length)
    padded = torch.zeros(len(lengths), cuts[-1], dtype=torch.int64)
    padded[:, : text.shape[1]] = text[by_length, : cuts[-1]]
    return Samples(
        positions=samples.positions[by_length],
        ids=samples.ids[by_length],
        seeds=samples.seeds[by_length],
        images=None if samples.images is None else _select(samples.images, by_length),
        text=padded,
        lengths=lengths,
        cuts=cuts,
    )


class MicroBatches(Dataset[Batch]):
    """The map-style data set: {stream: (positions, sources, ids)} -> Batch."""

    def __init__(self, streams: Mapping[str, Stream], tokenizer: Tokenizer, text_groups: int) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._text_groups = text_groups

    def __getitem__(self, item: Mapping[str, StreamItem]) -> Batch:
        parts = {
            name: self._streams[name].read(stream_item, self._tokenizer, self._text_groups)
            for name, stream_item in item.items()
        }
        first_stream = next(iter(parts.values()))[0]
        seed = int(first_stream.seeds[first_stream.positions.argmin()])
        refused = tuple(refusal for _, refusals in parts.values() for refusal in refusals)
        return Batch({name: samples for name, (samples, _) in parts.items()}, seed, refused)


class StepSampler(Sampler[dict[str, StreamItem]]):
    """Every micro-batch of one rank, step after step, from step `first_step` to `num_steps`."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        num_micro_batches: int,
    ) -> None:
        self._streams = streams
        self._steps = range(first_step, num_steps)
        self._place = (rank, world_size, num_micro_batches)

    def __iter__(self) -> Iterator[dict[str, StreamItem]]:
        for step in self._steps:
            parts = {
                name: step_positions(stream.order, step * stream.batch_size, stream.batch_size, *self._place)
                for name, stream in self._streams.items()
            }
            for i in range(self._place[2]):
                yield {name: part[i] for name, part in parts.items()}


def build_loader(
    streams: Mapping[str, Stream],
    tokenizer: Tokenizer,
    first_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_micro_batches: int = 1,
    workers: int = 0,
    text_groups: int = 4,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A loader whose items are the micro-batches of one rank, in order: `num_micro_batches` items a step.

    Raises: ValueError if a stream's batch size does not divide over the ranks and micro-batches.
    """
    for name, stream in streams.items():
        if stream.batch_size % (world_size * num_micro_batches):
            raise ValueError(
                f"data.train.{name}.batch_size is {stream.batch_size}; expected a multiple of {world_size} processes "
                f"x {num_micro_batches} micro-batches: change it, the number of processes, or trainer.micro_batch_size"
            )
    return DataLoader(
        MicroBatches(streams, tokenizer, text_groups),
        sampler=StepSampler(streams, first_step, num_steps, rank, world_size, num_micro_batches),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # others would import torch in every worker
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


def ignore_signals(worker: int) -> None:
    """In a worker: a signal to the whole process group is the trainer's to answer; SIGTERM from the trainer ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says() -> None:
    # Were SIGTERM ignored whoever sends it, a run that ends with an error would wait for its workers for ever.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
