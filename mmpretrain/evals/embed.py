"""Held-out data as embeddings: what every evaluator starts from, computed once and spread over the ranks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpretrain import distributed
from mmpretrain.batch import Refused
from mmpretrain.data.decode import BadSample, read_label
from mmpretrain.data.loader import ignore_signals
from mmpretrain.data.packing import packed
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shards
from mmpretrain.data.stream import read_captions
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel

log = logging.getLogger(__name__)

_MAX_NAMED = 5
_MAX_CHECKED = 20


@dataclass(frozen=True)
class Classes:
    """The classes of a data set: names, and for each the texts that stand for it."""

    names: Sequence[str]
    texts: Sequence[Sequence[str]]


@dataclass(frozen=True)
class EvalSet:
    """One held-out data set.

    `caption` is `txt` or `json.<path>`; `label` is `cls` (an integer) or `json.<path>` (an integer or a class's
    name). None where the data set has none.
    """

    name: str
    shards: Shards
    preprocess: Preprocess
    caption: str | None = None
    label: str | None = None
    classes: Classes | None = None


@dataclass(frozen=True)
class Embedded:
    """A data set in the shared space, the same on every rank, in the data's order.

    `images` [n, e] and `texts` [m, e] of unit length, float32; a text is there once, however many images it
    describes, and `captions` [m] says it. `samples` int64 [n]: which samples of the data set the images are.
    `pairs` int64 [p, 2]: (image, text) that belong together. `labels` int64 [n], -1 where unknown.
    `refused`: samples that could not be read, which are left out.
    """

    images: Tensor
    texts: Tensor
    captions: Sequence[str]
    samples: Tensor
    pairs: Tensor
    labels: Tensor
    refused: Sequence[Refused]


Record = tuple[Tensor | None, list[str], int, str]
"""(image uint8 [3, h, w] or None if it was refused, captions, label, the reason if it was refused)."""


class _Records(Dataset[Record]):
    def __init__(self, data: EvalSet) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.shards.num_samples

    def _label(self, sample: int) -> int:
        data = self._data
        if data.label is None:
            return -1
        member = data.shards.read(sample, (data.label.split(".")[0],))
        value = read_label(member, data.label)
        # `cls` is an index, also where classes are named by numbers.
        if data.label != "cls" and data.classes is not None and value in data.classes.names:
            return data.classes.names.index(value)
        try:
            label = int(value)
        except ValueError:
            raise BadSample(f"its label {value!r} is neither an integer nor the name of a class") from None
        if data.classes is not None and not 0 <= label < len(data.classes.names):
            raise BadSample(f"its label {label} is none of the {len(data.classes.names)} classes")
        return label

    def __getitem__(self, sample: int) -> Record:
        data = self._data
        try:
            encoded = data.shards.read(sample, IMAGE_EXTENSIONS)
            image = data.preprocess(encoded)
            captions = [] if data.caption is None else read_captions(data.shards, sample, data.caption)
            return image, captions, self._label(sample), ""
        except BadSample as error:
            return None, [], -1, str(error)


def read_image(data: EvalSet, sample: int) -> Tensor:
    """One image of a data set as the model sees it, uint8 [c, h, w]. Raises: BadSample."""
    return data.preprocess(data.shards.read(sample, IMAGE_EXTENSIONS))


def embed_texts(model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """Texts -> [m, e] of unit length, float32, on the model's device; each rank does its share. A collective."""
    device = model.device
    mine = texts[_share(len(texts))]
    parts = []
    for start in range(0, len(mine), batch_size):
        ids, lengths = tokenizer(mine[start : start + batch_size])
        packing = packed(lengths, ids.shape[1])
        packing = None if packing is None else packing.map(lambda tensor: tensor.to(device))
        encoding = model.encode_text(ids.to(device), lengths.to(device), packing)
        parts.append(model.project_text(encoding.pooled).float())
    local = torch.cat(parts) if parts else torch.zeros(0, model.embed_dim, device=device)
    return distributed.gather_ragged_rows(local)


def _share(count: int) -> slice:
    """This rank's consecutive part of `count` things."""
    bounds = np.linspace(0, count, distributed.world_size() + 1).astype(int)
    return slice(int(bounds[distributed.rank()]), int(bounds[distributed.rank() + 1]))


@torch.no_grad()
def embed(model: ImageTextModel, tokenizer: Tokenizer, data: EvalSet, batch_size: int, workers: int) -> Embedded:
    """Embed a data set; each rank does its share, and every rank gets the whole. A collective.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        data: what to embed.
        batch_size: samples that one device holds at once.
        workers: decoding processes of each rank.

    Samples that cannot be read are left out, with a warning that names them.

    Raises: ValueError if no sample can be read.
    """
    device = model.device
    share = _share(data.shards.num_samples)
    loader = DataLoader(
        _Records(data),
        sampler=range(share.start, share.stop),
        batch_size=batch_size,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # others would import torch in every worker
        worker_init_fn=ignore_signals,
    )
    images, captions, labels, samples, refused = [], [], [], [], []
    for sample, records in zip(range(share.start, share.stop, batch_size), loader, strict=True):
        kept = [record for record in records if record[0] is not None]
        for offset, (image, _, _, reason) in enumerate(records):
            if image is None:
                shard = data.shards.path(int(data.shards.locate(np.array([sample + offset]))[0][0]))
                refused.append(Refused(data.name, shard, data.shards.key(sample + offset), reason))
        if kept:
            pixels = torch.stack([record[0] for record in kept if record[0] is not None]).to(device)
            images.append(model.project_image(model.encode_image(pixels).pooled).float())
            captions += [record[1] for record in kept]
            samples += [sample + offset for offset, record in enumerate(records) if record[0] is not None]
            labels += [record[2] for record in kept]
    local = torch.cat(images) if images else torch.zeros(0, model.embed_dim, device=device)
    all_images = distributed.gather_ragged_rows(local)
    gathered = distributed.gather_objects((captions, labels, refused, samples))
    all_refused = [refusal for part in gathered for refusal in part[2]]
    _tell_refused(data, all_refused)
    all_captions = [texts for part in gathered for texts in part[0]]
    distinct = {text: None for texts in all_captions for text in texts}
    number = {text: i for i, text in enumerate(distinct)}
    pairs = [(i, number[text]) for i, texts_of in enumerate(all_captions) for text in texts_of]
    return Embedded(
        images=all_images,
        texts=embed_texts(model, tokenizer, list(distinct), batch_size),
        captions=list(distinct),
        samples=torch.tensor([sample for part in gathered for sample in part[3]], dtype=torch.int64),
        pairs=torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2),
        labels=torch.tensor([label for part in gathered for label in part[1]], dtype=torch.int64, device=device),
        refused=all_refused,
    )


def check_readable(data: EvalSet) -> None:
    """Read some samples, so that a wrong field ends a run at its start. Raises: ValueError if none can be used."""
    records = _Records(data)
    reasons = [records[sample][3] for sample in range(min(_MAX_CHECKED, len(records)))]
    if all(reasons):
        raise ValueError(
            f"data.val.{data.name}: none of its first {len(reasons)} samples can be used; of the first (key "
            f"{data.shards.key(0)!r}): {reasons[0]}; mend the data, or data.val.{data.name}.caption and .label"
        )


def _tell_refused(data: EvalSet, refused: Sequence[Refused]) -> None:
    """Name what is left out of a data set. Raises: ValueError if nothing is left of it."""
    if not refused:
        return
    named = "; ".join(f"{refusal.key} of {refusal.shard}: {refusal.reason}" for refusal in refused[:_MAX_NAMED])
    count = f"{len(refused)} of the {data.shards.num_samples} samples of data.val.{data.name} cannot be used"
    if len(refused) == data.shards.num_samples:
        raise ValueError(f"{count}, such as {named}; mend the data, or data.val.{data.name}.caption and .label")
    if distributed.is_main():
        log.warning("%s and are left out: %s%s", count, named, "; ..." if len(refused) > _MAX_NAMED else "")
