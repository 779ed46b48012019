"""Held-out samples as micro-batches of an objective, in blocks that do not depend on ranks or batch sizes."""

from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.batch import Batch, MissingField, Refused, Samples
from mmpretrain.data.classes import read_class
from mmpretrain.data.fields import read_captions
from mmpretrain.data.image_batches import image_batches, split
from mmpretrain.data.stream import with_text
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.evals.base import Context
from mmpretrain.evals.embeddings import EvalSet, tell_refused
from mmpretrain.models.evaluation_mode import in_evaluation_mode
from mmpretrain.objectives.base import IndependentObjective
from mmpretrain.schedules import Clock, TrainingProgress
from mmpretrain.seeds import draws, hash64
from mmpretrain.training.task import Encodings

_FAR = 1 << 62
END = TrainingProgress(_FAR, Clock(1, 1, _FAR))
"""Progress at which every scheduled value has its last value, in any unit."""


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a data set that could be read; there may be none.

    - `batch`: the samples as a micro-batch, whose texts are the first captions; on the host.
    - `numbers`: index of each sample in the data set.
    - `captions`: all captions of each sample; empty lists if none were asked for.
    """

    batch: Batch
    numbers: list[int]
    captions: list[list[str]]


@dataclass(frozen=True)
class _Reader:
    """Reader of the fields that an objective needs: writes the image, and returns the captions and the class."""

    data: EvalSet
    fields: Collection[str]

    def __call__(self, sample: int, out: Tensor) -> tuple[list[str], int]:
        data = self.data
        if "images" in self.fields and data.preprocess is not None:
            data.preprocess(data.shards.read(sample, IMAGE_EXTENSIONS), out)
        captions: list[str] = []
        if "texts" in self.fields and data.caption is not None:
            captions = read_captions(data.shards, sample, data.caption)
        label = -1
        if "labels" in self.fields and data.label is not None:
            label = read_class(data.shards, sample, data.label, data.classes)
        return captions, label


def blocks(
    name: str, context: Context, streams: Collection[str], fields: Collection[str], size: int
) -> Generator[Block, None, None]:
    """Read this rank's share of a data set's blocks of `size` consecutive samples. A collective.

    The seed of a sample depends on its index alone, so that masks are the same in every evaluation of a data set. Samples
    that cannot be read are left out, and a warning names them.

    Args:
        name: name of the data set.
        context: input of the evaluator.
        streams: names under which the objective reads the samples.
        fields: some of `images`, `texts` and `labels`; others are not read.
        size: number of samples of a block; the last one may be smaller.

    Returns: generator of blocks, to be read to its end on every rank.
    Raises: ValueError if no sample can be read; LoaderError if a worker is lost.
    """
    data = context.sets[name]
    of_all = split(range(data.shards.num_samples), size)
    mine = of_all[distributed.share(len(of_all))]
    preprocess = data.preprocess if "images" in fields else None
    channels, side = (1, 1) if preprocess is None else (preprocess.channels, preprocess.image_size)
    refused: list[Refused] = []
    loaded = image_batches(_Reader(data, fields), mine, channels, side, context.workers, context.timeout_seconds)
    with closing(loaded):
        for _ in range(-(-len(of_all) // distributed.world_size())):
            context.check_stop()
            if (read := next(loaded, None)) is None:
                continue
            for sample, reason in read.refused:
                refused.append(Refused(name, data.shards.location(sample), data.shards.key(sample), reason))
            samples = _samples(read.samples)
            if preprocess is not None:
                samples = replace(samples, images=read.images)
            captions = [of_sample for of_sample, _ in read.values]
            if "texts" in fields and read.samples:
                text, lengths = context.tokenizer([of_sample[0] for of_sample in captions])
                samples = with_text(samples, text, lengths, context.tokenizer)
            if "labels" in fields:
                samples = replace(samples, labels=torch.tensor([label for _, label in read.values], dtype=torch.int64))
            seed = int(samples.seeds[0]) if read.samples else 0
            yield Block(Batch(dict.fromkeys(streams, samples), seed, END), read.samples, captions)
    tell_refused(data, [refusal for part in distributed.gather_objects(refused) for refusal in part])


def _samples(numbers: list[int]) -> Samples:
    """Return samples without images and texts, with seeds drawn from their numbers."""
    seeds = draws(np.uint64(hash64("held-out")), np.array(numbers, dtype=np.int64))
    positions = torch.tensor(numbers, dtype=torch.int64)
    return Samples(positions, positions, torch.from_numpy(seeds.view(np.int64)))


def needed_fields(objective: IndependentObjective, context: Context) -> frozenset[str]:
    """Return the fields that an objective reads, of `images`, `texts` and `labels`, by computing a loss of one sample."""
    needed: set[str] = set()
    while True:
        samples = _samples([0])
        if "images" in needed:
            encoder = context.model.image_encoder
            shape = (1, context.model.num_channels, encoder.image_size, encoder.image_size)
            samples = replace(samples, images=torch.zeros(shape, dtype=torch.uint8))
        if "texts" in needed:
            samples = with_text(samples, *context.tokenizer(["a"]), context.tokenizer)
        if "labels" in needed:
            samples = replace(samples, labels=torch.zeros(1, dtype=torch.int64))
        batch = Batch(dict.fromkeys(objective.streams, samples), progress=END).to(context.model.device)
        try:
            with torch.no_grad(), context.autocast, in_evaluation_mode(context.model, objective):
                objective.loss(Encodings(context.model, batch))
            return frozenset(needed)
        except MissingField as missing:
            if missing.field in needed:
                raise
            needed.add(missing.field)
