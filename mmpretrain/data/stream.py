"""Streams of training samples: sources, sample order, decoding and tokenizing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Protocol, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.batch import Refused, Samples
from mmpretrain.data.augment import Augmentation
from mmpretrain.data.classes import Classes
from mmpretrain.data.decode import MAX_IMAGE_BYTES, BadSample, image_memory
from mmpretrain.data.episodes import EpisodeOrder
from mmpretrain.data.mixing import Mix
from mmpretrain.data.order import Order, PositionOrder, SourceOrder
from mmpretrain.data.packing import packed, row_length
from mmpretrain.data.sample_reader import CLASS_TEXT, CaptionFields, Fields, SampleReader
from mmpretrain.data.shorten import Shorten, shortened
from mmpretrain.data.source import SampleSource, ShardedSource, concatenated
from mmpretrain.data.subset import samples_by_class
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.data.transforms import Transform
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress
from mmpretrain.seeds import draw, draws, hash64

_MAX_REPLACEMENTS = 20

StreamItem = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions, sources and sample ids of one micro-batch, int64 [b] each."""


@dataclass(frozen=True)
class Source:
    """Samples of a stream, with their sampling weight. Sources without weights are merged into one data set."""

    name: str
    samples: SampleSource
    weight: float | None = None


class Shuffle(str, Enum):
    """Order of the samples: blocks of 256 samples in random order, or whole shards."""

    blocks = "blocks"
    shards = "shards"


class Stream(Protocol):
    """Interface of a stream to the loader and the trainer."""

    name: str
    batch_size: ScheduledValue
    """Samples per step, over all ranks."""
    order: Order
    fingerprints: dict[str, str]
    """Fingerprint of each source by name; it changes with the data."""
    prefetch_samples: int
    """Number of positions ahead of a step whose samples are fetched; 0 if none have to be."""

    def prefetch(self, item: StreamItem, is_urgent: bool) -> None:
        """Fetch the samples of a micro-batch in the background: one that is read next, or a later one."""
        ...

    def check_first_sample(self) -> None:
        """Read a first sample, so that a wrong field ends the run at its start. Raises: ValueError."""
        ...

    def sample_key(self, position: int) -> str:
        """Return a name for the sample at `position`."""
        ...

    def read(self, item: StreamItem, tokenizer: Tokenizer, progress: TrainingProgress) -> tuple[Samples, list[Refused]]:
        """Return the stream's part of one micro-batch, and the refused samples."""
        ...


@dataclass(frozen=True)
class _Row:
    """Usable sample at one position: its id within the stream, its values, and the samples refused before it.

    `mixed` is the class and the share of the image that its image is mixed with.
    """

    id: int
    fields: Fields
    refused: list[Refused]
    mixed: tuple[int, float] | None = None


def _check_tokenizes(tokenizer: Tokenizer, caption: str) -> None:
    """Raise BadSample if the tokenizer rejects the caption."""
    try:
        tokenizer([caption])
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise BadSample(f"its caption cannot be tokenized ({reason})", "caption_tokens") from error


def _is_remote(samples: SampleSource) -> TypeGuard[ShardedSource]:
    return isinstance(samples, ShardedSource) and samples.is_remote


def _shard_sizes(samples: SampleSource, shuffle: Shuffle, key: str) -> np.ndarray | None:
    """Return the sizes of the shards for an order by shards; None for one by blocks. Raises: ValueError."""
    if shuffle == Shuffle.blocks:
        if isinstance(samples, ShardedSource) and not samples.is_indexed:
            raise ValueError(
                f"{key}.shuffle is blocks, but {samples.location(0)} or another shard has no index; expected "
                f"{key}.shuffle=shards, or indexes: python -m data_tools index"
            )
        return None
    sizes = samples.shard_sizes if isinstance(samples, ShardedSource) else None
    if sizes is None:
        raise ValueError(
            f"{key}.shuffle is shards, but its samples do not lie in shards; expected {key}.shuffle=blocks"
        )
    return sizes


class SampleStream:
    """Stream of samples from one or several sources.

    Args:
        name: name of the stream; part of every seed.
        sources: sources to draw samples from.
        batch_size: samples per step, over all ranks; may change in stages, as may image_size and text_length.
        seed: seed of the run.
        caption: caption field (`txt` or `json.<path>`), a list of fields, or a mapping from field to weight; None
            for a stream without text.
        transform: chooses the crop of each image; None for a stream without images.
        image_size: side length of the images, in pixels.
        text_length: maximum number of tokens per text, including start and end; None leaves it to the tokenizer.
        shorten: tokens to keep of a longer text (see `data.shorten`).
        max_image_bytes: memory limit for decoding one image, in bytes; images that need more are refused.
        channels: image channels: 3 (RGB), 1 (grey) or 4 (with transparency).
        augment: augmentations of the cropped image, applied in this order.
        group: value that samples of one group share: `caption`, `id`, `cls` or `json.<path>`; None for no groups.
        views: (transform, augment) of each further view of the image; views are drawn independently.
        repeat_batches: number of batches after which the same batches repeat, crops and masks included; None never
            repeats.
        shuffle: order of the samples; with `shards`, two or more shards at a time, as remote ones without indexes need.
        label: class of each sample: `cls` (an integer) or `json.<path>` (an integer or a class's name); None for no labels.
        classes: the classes; None if they are not known.
        mix: mixing of images and classes; None for none.
        episodes: number of classes of a batch, and of samples of each; None for any classes.

    Raises: ValueError if the stream has neither text nor images, or lacks what another argument needs.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        batch_size: Scheduled,
        seed: int,
        caption: str | Sequence[str] | Mapping[str, float] | None,
        transform: Transform | None,
        image_size: Scheduled,
        channels: int = 3,
        augment: Sequence[Augmentation] = (),
        group: str | None = None,
        views: Sequence[tuple[Transform, Sequence[Augmentation]]] = (),
        repeat_batches: int | None = None,
        text_length: Scheduled | None = None,
        shorten: Shorten = Shorten.truncate,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        shuffle: Shuffle = Shuffle.blocks,
        label: str | None = None,
        classes: Classes | None = None,
        mix: Mix | None = None,
        episodes: tuple[int, int] | None = None,
    ) -> None:
        weights = [source.weight for source in sources]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"data.train.{name}.sources have weights {weights}; give every source a weight, or none")
        if transform is None and caption is None:
            raise ValueError(f"data.train.{name} has neither a caption nor a transform; name at least one")
        if shorten != Shorten.truncate and text_length is None:
            raise ValueError(
                f"data.train.{name}.shorten is {shorten.value}, but no length to shorten texts to is given; set "
                f"data.train.{name}.text_length"
            )
        captions = None if caption is None else CaptionFields(caption, f"data.train.{name}.caption")
        if captions is not None and CLASS_TEXT in captions.names and (label is None or classes is None):
            raise ValueError(
                f"data.train.{name}.caption is {CLASS_TEXT}, a text of the sample's class, but the stream has no "
                f"{'label' if label is None else 'classes'}; set data.train.{name}.label and .classes"
            )
        if mix is not None and (label is None or transform is None):
            raise ValueError(
                f"data.train.{name}.mix mixes images and classes, but the stream has no "
                f"{'label' if label is None else 'transform'}; set data.train.{name}.label and .transform, or mix=null"
            )
        self.name = name
        self.batch_size = ScheduledValue(batch_size, f"data.train.{name}.batch_size", in_stages=True, at_least=1)
        self.sources = list(sources)
        if None in weights and len(sources) > 1:
            # Sources without weights form one data set: each sample is seen once per epoch.
            self.sources = [
                Source("+".join(source.name for source in sources), concatenated([s.samples for s in sources]))
            ]
        if episodes is not None:
            self._check_episodes(*episodes, label, shuffle)

        def order_of(source: Source) -> PositionOrder:
            own = hash64(seed, name, source.name)
            sizes = _shard_sizes(source.samples, shuffle, f"data.train.{name}")
            if episodes is not None:
                assert label is not None
                try:
                    return EpisodeOrder(own, [*samples_by_class(source.samples, label, classes).values()], *episodes)
                except ValueError as error:
                    raise ValueError(f"data.train.{name}.episodes: {error}") from error
            return SourceOrder(own, source.samples.num_samples, sizes)

        orders = [order_of(source) for source in self.sources]
        remote = [i for i, source in enumerate(self.sources) if _is_remote(source.samples)]
        self.prefetch_samples = max((orders[i].window_samples for i in remote), default=0)
        self.order = Order(
            orders,
            [1.0 if source.weight is None else source.weight for source in self.sources],
            None if repeat_batches is None else repeat_batches * int(self.batch_size.values[0]),
        )
        self.fingerprints: dict[str, str] = {source.name: source.samples.fingerprint for source in self.sources}
        self._seed = hash64(seed, name)
        self._captions, self._has_images = captions, transform is not None
        self._image_size = ScheduledValue(image_size, f"data.train.{name}.image_size", in_stages=True, at_least=1)
        self._text_length = (
            None
            if text_length is None
            else ScheduledValue(text_length, f"data.train.{name}.text_length", in_stages=True, at_least=3)
        )
        self._shorten = shorten
        self._channels, self._num_views = channels, len(views)
        self._group, self._label, self._mix = group, label, mix
        sizes = [source.samples.num_samples for source in self.sources]
        self._readers = [
            SampleReader(
                source.samples,
                int(first_id),
                captions,
                transform,
                augment,
                views,
                channels,
                max_image_bytes,
                group,
                label,
                classes,
            )
            for source, first_id in zip(self.sources, np.cumsum([0, *sizes[:-1]]))
        ]

    def _check_episodes(self, ways: int, per_class: int, label: str | None, shuffle: Shuffle) -> None:
        """Raises: ValueError if a batch is not one episode of one labelled source."""
        key = f"data.train.{self.name}"
        if label is None or len(self.sources) > 1:
            raise ValueError(
                f"{key}.episodes needs {'labels' if label is None else 'a single source'}; expected "
                + (f"{key}.label, such as cls" if label is None else "sources without weights, or episodes.ways=0")
            )
        if shuffle != Shuffle.blocks:
            raise ValueError(
                f"{key}.shuffle is {shuffle.value}, but episodes draw from all samples of a class; expected "
                f"{key}.shuffle=blocks"
            )
        if any(size != ways * per_class for size in self.batch_size.values):
            raise ValueError(
                f"{key}.episodes has {ways} classes of {per_class} samples, but batches of "
                f"{'/'.join(f'{size:g}' for size in self.batch_size.values)}; expected one episode a batch: "
                f"trainer.batch_size={ways * per_class}"
            )

    def check_first_sample(self) -> None:
        """Read every field of one sample per source, so that a wrong field ends the run at its start.

        One bad sample does not prove that the field is wrong, so as many samples are tried as in training.
        Raises: ValueError with the problem of the first sample and its fix.
        """
        for reader in self._readers:
            for fix, read in self._reads(reader):
                self._check_readable(reader.samples, read, fix)

    def _reads(self, reader: SampleReader) -> list[tuple[str, Callable[[int], object]]]:
        """Return functions that read each part of a sample, with the fix for a part that cannot be read.

        The class comes first, since a caption may be one of its texts.
        """
        key = f"data.train.{self.name}"
        reads: list[tuple[str, Callable[[int], object]]] = []
        if self._label is not None:
            fix = f"set {key}.label to cls or a field `json.<name>` that it has, and {key}.classes to the list of its classes"
            reads.append((fix, reader.read_class))
        if self._captions is not None:
            fix = f"set {key}.caption to `txt` or a field `json.<name>` that it has, or fix the data"
            reads += [(fix, partial(reader.read_captions, field=field)) for field in self._captions.names]
        if self._group is not None:
            fix = f"set {key}.group to caption, id, cls or a field `json.<name>` that it has"
            reads.append((fix, partial(reader.read_group, caption="")))
        if self._has_images:
            out = [*image_memory(1 + self._num_views, self._channels, int(self._image_size.values[0]))]
            reads.append(("fix the data", partial(reader.read_images, seed=0, out=out)))
        return reads

    def _check_readable(self, samples: SampleSource, read: Callable[[int], object], fix: str) -> None:
        first = [*range(min(_MAX_REPLACEMENTS, samples.num_samples))]
        # A shard that is missing says nothing of the others.
        spread = np.linspace(0, samples.num_samples - 1, _MAX_REPLACEMENTS, dtype=int).tolist()
        errors: list[BadSample] = []
        for sample in [*first, *spread]:
            if len(errors) == len(first) and any(error.code != "shard_missing" for error in errors):
                break
            try:
                read(sample)
                return
            except BadSample as error:
                errors.append(error)
        if all(error.code == "shard_missing" for error in errors):
            fix = "restore the shards"
        raise ValueError(
            f"data.train.{self.name}: none of the first {len(first)} samples of {samples.location(0)} can be used; "
            f"of the first (key {samples.key(0)!r}): {errors[0]}; {fix}"
        )

    def prefetch(self, item: StreamItem, is_urgent: bool) -> None:
        _, sources, ids = item
        for i in np.unique(sources).tolist():
            samples = self.sources[i].samples
            if _is_remote(samples):
                samples.prefetch(ids[sources == i], is_urgent)

    def sample_key(self, position: int) -> str:
        """Return the location and key of the sample at `position`."""
        sources, ids = self.order(np.array([position]))
        samples, sample = self.sources[int(sources[0])].samples, int(ids[0])
        return f"{samples.location(sample)}:{samples.key(sample)}"

    def _memory(self, n: int, size: int) -> tuple[Tensor, Tensor]:
        """Return uninitialised memory for images, uint8 [n, c, size, size], and views, uint8 [n, v, c, size, size]."""
        size = size if self._has_images else 0
        views = image_memory(n * self._num_views, self._channels, size)
        return image_memory(n, self._channels, size), views.unflatten(0, (n, self._num_views))

    def _usable(
        self, source: int, sample: int, seed: int, out: Sequence[Tensor], tokenizer: Tokenizer | None = None
    ) -> "_Row":
        """Return the sample, or its first usable replacement. With a tokenizer, the caption must tokenize, too.

        Raises: ValueError if twenty samples in a row are unusable.
        """
        reader = self._readers[source]
        samples = reader.samples
        refused: list[Refused] = []
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                fields = reader.read(sample, seed, out)
                if tokenizer is not None:
                    _check_tokenizes(tokenizer, fields.caption or "")
                return _Row(reader.first_id + sample, fields, refused)
            except BadSample as error:
                refused.append(
                    Refused(self.name, samples.location(sample), samples.key(sample), str(error), error.code)
                )
                sample = draw(hash64(seed, "replacement"), attempt) % samples.num_samples
        raise ValueError(
            f"{_MAX_REPLACEMENTS} samples in a row of {self.sources[source].name!r} cannot be used, the last (key "
            f"{refused[-1].key} of {refused[-1].shard}) for: {refused[-1].reason}; fix the data"
        )

    def _mixed(self, row: _Row, source: int, seed: int, image: Tensor, mix: Mix) -> _Row:
        """Mix another image of the source into a sample's image, if `mix` draws it. Raises: as `_usable`."""
        if not mix.is_mixed(seed):
            return row
        own = hash64(seed, "mixed-sample")
        (out,) = image_memory(1, self._channels, image.shape[-1])
        other = self._usable(source, draw(own, 0) % self.sources[source].samples.num_samples, own, [out])
        share = mix(image, out, seed)
        return replace(row, mixed=(other.fields.label, share), refused=[*row.refused, *other.refused])

    def read(self, item: StreamItem, tokenizer: Tokenizer, progress: TrainingProgress) -> tuple[Samples, list[Refused]]:
        """Decode the stream's part of one micro-batch. A bad sample's replacement is a pure function of its position.

        Raises: OSError for an I/O error; ValueError if no usable sample is found for a position.
        """
        positions, sources, ids = item
        seeds = draws(np.uint64(self._seed), positions)
        images, views = self._memory(len(positions), int(self._image_size(progress)))
        samples_drawn = zip(sources.tolist(), ids.tolist(), seeds.tolist(), strict=True)
        drawn = list(zip(samples_drawn, images, views, strict=True))
        rows = [self._usable(*sample, [image, *more]) for sample, image, more in drawn]
        if self._captions is not None:
            try:
                text, lengths = tokenizer([row.fields.caption or "" for row in rows])
            except ValueError:  # the error does not say which text failed
                for i, (sample, image, more) in enumerate(drawn):
                    try:
                        _check_tokenizes(tokenizer, rows[i].fields.caption or "")
                    except BadSample:
                        rows[i] = self._usable(*sample, [image, *more], tokenizer)
                text, lengths = tokenizer([row.fields.caption or "" for row in rows])
        if self._mix is not None:
            rows = [
                self._mixed(row, source, seed, image, self._mix)
                for row, ((source, _, seed), image, _) in zip(rows, drawn, strict=True)
            ]
        groups = np.array([row.fields.group for row in rows], np.uint64)
        samples = Samples(
            positions=torch.from_numpy(positions.copy()),
            ids=torch.tensor([row.id for row in rows]),
            seeds=torch.from_numpy(seeds.view(np.int64)),
            groups=None if self._group is None else torch.from_numpy(groups.view(np.int64)),
        )
        if self._label is not None:
            samples = replace(samples, labels=torch.tensor([row.fields.label for row in rows]))
        if self._mix is not None:
            labels, shares = zip(*(row.mixed or (row.fields.label, 0.0) for row in rows), strict=True)
            samples = replace(samples, mixed_labels=torch.tensor(labels), mixed_shares=torch.tensor(shares))
        if self._captions is not None:
            if self._text_length is not None:
                text, lengths = shortened(text, lengths, samples.seeds, int(self._text_length(progress)), self._shorten)
            samples = with_text(samples, text, lengths, tokenizer)
        if self._has_images:
            samples = replace(samples, images=images, views=views if self._num_views else None)
        return samples, [refused for row in rows for refused in row.refused]


def with_text(samples: Samples, text: Tensor, lengths: Tensor, tokenizer: Tokenizer) -> Samples:
    """Return `samples` with text, int64 [b, L], cut or padded to `row_length`, its packing and word starts."""
    length = row_length(lengths, tokenizer.context_length)
    padded = F.pad(text, (0, length - text.shape[1]))
    return replace(
        samples,
        text=padded,
        lengths=lengths,
        word_starts=tokenizer.word_starts(padded) if hasattr(tokenizer, "word_starts") else None,
        packing=packed(lengths, length),
    )
