"""Embeddings of images and texts, for evaluators and the command `embed`, computed in parallel over the ranks."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.batch import Refused
from mmpretrain.data.classes import Classes, read_class
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_captions, read_json_field
from mmpretrain.data.image_batches import ImageBatch, Read, image_batches, split
from mmpretrain.data.packing import packed
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.source import SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import UsageError
from mmpretrain.models.image_text import ImageTextModel

log = logging.getLogger(__name__)

CheckStop = Callable[[], None]
"""Function called before each batch, equally often on all ranks. An exception that it raises ends the embedding."""

_MAX_NAMED = 5
_MAX_CHECKED = 20


def go_on() -> None:
    """Do nothing: the default `check_stop`, which never ends the embedding early."""


@dataclass(frozen=True)
class EvalSet:
    """One held-out data set.

    `preprocess` is None if the model has no image encoder, or the data set has no images; they are then not read.
    `caption` is `txt` or `json.<path>`. `label` is `cls` (an integer) or `json.<path>` (an integer or a class name).
    `fields` are further fields that evaluators ask for, `json.<path>` each. `train` is the training split, with the same
    fields. Any of these is None or empty if the data set has none.
    """

    name: str
    shards: SampleSource
    preprocess: Preprocess | None
    caption: str | None = None
    label: str | None = None
    classes: Classes | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    train: SampleSource | None = None
    sources: str = ""
    """Configuration of `shards` and `train` that are no tars. Embeddings depend on the columns that it names."""
    key: str | None = None
    """Key of the configuration that messages name; None: `data.val.<name>`."""

    @property
    def shown_key(self) -> str:
        """Key of the configuration that messages name."""
        return self.key or f"data.val.{self.name}"


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a data set in the data's order, the same on every rank.

    The width e is 0 for images if the model has no image encoder, and for texts if it has no text encoder.

    - `images`: image embeddings of unit length, float32 [n, e].
    - `features`: pooled states of the image encoder, before the projection, float32 [n, width].
    - `texts`: embeddings of the distinct texts, of unit length, float32 [m, e].
    - `text_features`: pooled states of the text encoder, before the projection, float32 [m, width].
    - `captions`: the distinct texts [m].
    - `samples`: index of each image's sample in the data set, int64 [n].
    - `pairs`: indices (image, text) of matching pairs, int64 [p, 2].
    - `labels`: class of each image, int64 [n]; -1 if unknown.
    - `fields`: values of each of the data set's `fields` [n].
    - `refused`: samples that could not be read and are left out.
    """

    images: Tensor
    features: Tensor
    texts: Tensor
    text_features: Tensor
    captions: Sequence[str]
    samples: Tensor
    pairs: Tensor
    labels: Tensor
    fields: Mapping[str, Sequence[Any]]
    refused: Sequence[Refused]

    @cached_property
    def first_texts(self) -> list[int]:
        """Index in `texts` of each image's first caption, [n]; -1 for an image without captions."""
        first = dict(reversed(self.pairs.tolist()))  # pairs are in the order of captions: an image's first one remains
        return [first.get(image, -1) for image in range(len(self.images))]


@dataclass(frozen=True)
class _Reader:
    """Reader of a data set's samples, which writes the image and returns the other fields. A missing label is -1."""

    data: EvalSet

    def __call__(self, sample: int, out: Tensor | None = None) -> tuple[list[str], int, list[Any]]:
        """Write the image of a sample to `out`, uint8 [c, h, w].

        Returns: (captions, label, values of `fields`).
        Raises: BadSample.
        """
        data = self.data
        if data.preprocess is not None:
            data.preprocess(data.shards.read(sample, IMAGE_EXTENSIONS), out)
        captions = [] if data.caption is None else read_captions(data.shards, sample, data.caption)
        member = data.shards.read(sample, ("json",)) if data.fields else b""
        values = [read_json_field(member, path.removeprefix("json.")) for path in data.fields.values()]
        return captions, self._label(sample), values

    def _label(self, sample: int) -> int:
        data = self.data
        if data.label is None:
            return -1
        return read_class(data.shards, sample, data.label, data.classes)


def read_image(data: EvalSet, sample: int) -> Tensor:
    """Return one preprocessed image of a data set, uint8 [c, h, w]. Raises: BadSample."""
    assert data.preprocess is not None
    return data.preprocess(data.shards.read(sample, IMAGE_EXTENSIONS))


def embed_batches(
    model: ImageTextModel,
    read: Read,
    batches: Sequence[range],
    preprocess: Preprocess | None,
    workers: int,
    timeout_seconds: float = 600.0,
) -> Generator[tuple[ImageBatch, Tensor, Tensor], None, None]:
    """Read and embed batches of images.

    Args:
        model: model in evaluation mode. If it has no image encoder, samples are read and the embeddings have width 0.
        read: function that reads one sample, as in `image_batches`.
        batches: numbers of each batch's samples.
        preprocess: preprocessing that `read` applies; None if the model has no image encoder.
        workers: number of decoding processes.
        timeout_seconds: longest time that reading a batch may take, in seconds.

    Returns: generator of (batch, embeddings of its k readable images, float32 [k, e] of unit length, their pooled states
        before the projection, float32 [k, width]) on the model's device; close it if it is not read to its end.
    Raises: LoaderError if a worker is lost.
    """
    channels, size = (1, 1) if preprocess is None else (preprocess.channels, preprocess.image_size)
    with closing(image_batches(read, batches, channels, size, workers, timeout_seconds)) as loaded:
        for batch in loaded:
            if preprocess is None or not batch.samples:
                count, width = len(batch.samples), _image_width(model)
                none = torch.zeros(count, model.image_embed_dim, device=model.device)
                yield batch, none, torch.zeros(count, width, device=model.device)
            else:
                with torch.no_grad():
                    pooled = model.encode_image(batch.images.to(model.device)).pooled
                yield batch, model.embed_pooled_images(pooled).float(), pooled.float()


def _image_width(model: ImageTextModel) -> int:
    return 0 if model.image is None else model.image.width


def embed_texts(
    model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, check_stop: CheckStop = go_on
) -> Tensor:
    """Embed texts: [m, e] of unit length, float32, on the model's device. Each rank embeds its share. A collective.

    The result is [m, 0] if the model has no text encoder. `check_stop` is called before each batch, equally often on all
    ranks.
    """
    rows = [rows for rows, _ in _text_batches(model, tokenizer, texts, batch_size, check_stop)]
    return _gathered(rows, len(texts), model.text_embed_dim, model.device)


def _text_batches(
    model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, check_stop: CheckStop
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield (embeddings float32 [k, e], pooled states float32 [k, width]) of this rank's share of the texts."""
    if model.text is None:
        return
    mine = texts[distributed.share(len(texts))]
    for i in range(num_batches(len(texts), batch_size)):
        check_stop()
        if not (some := mine[i * batch_size : (i + 1) * batch_size]):
            continue
        ids, lengths = tokenizer(some)
        pooled = model.pool_texts(ids, lengths, packed(lengths, ids.shape[1]))
        yield model.embed_pooled_texts(pooled).float(), pooled.float()


def num_batches(count: int, batch_size: int) -> int:
    """Return the largest number of batches in any rank's share of `count` items."""
    largest_share = -(-count // distributed.world_size())
    return -(-largest_share // batch_size)


@torch.no_grad()
def embed(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    data: EvalSet,
    batch_size: int,
    workers: int,
    timeout_seconds: float = 600.0,
    check_stop: CheckStop = go_on,
) -> Embedded:
    """Embed a data set. Each rank embeds its share, and every rank gets all embeddings. A collective.

    Samples that cannot be read are left out, and a warning names them.

    Args:
        model: model in evaluation mode; a missing encoder embeds nothing.
        tokenizer: tokenizer of the model.
        data: data set to embed.
        batch_size: number of samples per batch on each device.
        workers: number of decoding processes of each rank.
        timeout_seconds: longest time that reading a batch may take, in seconds.
        check_stop: function called before each batch, equally often on all ranks. An exception that it raises ends the
            embedding.

    Raises: ValueError if no sample can be read; LoaderError if a worker is lost.
    """
    device = model.device
    share = range(data.shards.num_samples)[distributed.share(data.shards.num_samples)]
    batches = embed_batches(model, _Reader(data), split(share, batch_size), data.preprocess, workers, timeout_seconds)
    images, features, values, samples, refused = [], [], [], [], []
    with closing(batches):
        for _ in range(num_batches(data.shards.num_samples, batch_size)):
            check_stop()
            if (embedded := next(batches, None)) is None:
                continue
            batch, rows, pooled = embedded
            for sample, reason in batch.refused:
                refused.append(Refused(data.name, data.shards.location(sample), data.shards.key(sample), reason))
            images.append(rows)
            features.append(pooled)
            values += batch.values
            samples += batch.samples
    gathered = distributed.gather_objects((values, refused, samples))
    all_refused = [refusal for part in gathered for refusal in part[1]]
    tell_refused(data, all_refused)
    all_values = [each for part in gathered for each in part[0]]
    all_captions = [texts for texts, _, _ in all_values]
    distinct = {text: None for texts in all_captions for text in texts}
    number = {text: i for i, text in enumerate(distinct)}
    pairs = [(i, number[text]) for i, texts_of in enumerate(all_captions) for text in texts_of]
    text_rows = list(_text_batches(model, tokenizer, list(distinct), batch_size, check_stop))
    text_width = 0 if model.text is None else model.text.width
    return Embedded(
        images=_gathered(images, len(all_values), model.image_embed_dim, device),
        features=_gathered(features, len(all_values), _image_width(model), device),
        texts=_gathered([rows for rows, _ in text_rows], len(distinct), model.text_embed_dim, device),
        text_features=_gathered([pooled for _, pooled in text_rows], len(distinct), text_width, device),
        captions=list(distinct),
        samples=torch.tensor([sample for part in gathered for sample in part[2]], dtype=torch.int64),
        pairs=torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2),
        labels=torch.tensor([label for _, label, _ in all_values], dtype=torch.int64, device=device),
        fields={name: [fields[i] for _, _, fields in all_values] for i, name in enumerate(data.fields)},
        refused=all_refused,
    )


def _gathered(parts: Sequence[Tensor], count: int, width: int, device: torch.device) -> Tensor:
    """Return the rows of all ranks, float32 [count, width]. A collective unless the width is 0."""
    local = torch.cat([torch.zeros(0, width, device=device), *parts])
    return local.new_zeros(count, 0) if width == 0 else distributed.gather_ragged_rows(local)


def check_readable(data: EvalSet) -> None:
    """Read samples until one is usable, so that a wrong field ends a run at its start.

    Raises: ValueError if none of the first 20 samples is usable.
    """
    reader = _Reader(data)
    reasons = []
    for sample in range(min(_MAX_CHECKED, data.shards.num_samples)):
        try:
            reader(sample)
            return
        except BadSample as error:
            reasons.append(str(error))
    raise ValueError(
        f"data.val.{data.name}: none of its first {len(reasons)} samples can be used; of the first (key "
        f"{data.shards.key(0)!r}): {reasons[0]}; fix the data, or data.val.{data.name}.caption and .label"
    )


def tell_refused(data: EvalSet, refused: Sequence[Refused]) -> None:
    """Warn about the refused samples of a data set. Raises: ValueError if all were refused."""
    if not refused:
        return
    named = "; ".join(f"{refusal.key} of {refusal.shard}: {refusal.reason}" for refusal in refused[:_MAX_NAMED])
    count = f"{len(refused)} of the {data.shards.num_samples} samples of {data.shown_key} cannot be used"
    if len(refused) == data.shards.num_samples:
        fields = "" if data.key else f", or {data.shown_key}.caption and .label"
        raise ValueError(f"{count}, such as {named}; fix the data{fields}")
    if distributed.is_main():
        log.warning("%s and are left out: %s%s", count, named, "; ..." if len(refused) > _MAX_NAMED else "")


def check_several(name: str, embedded: Embedded) -> None:
    """Check that a data set has two images or more that could be read. Raises: UsageError."""
    if len(embedded.images) < 2:
        raise UsageError(
            f"data.val.{name} has 1 image that can be read, of {len(embedded.refused) + 1}; expected two or "
            "more: fix the others, or name other data sets in eval.<name>.data"
        )
