"""Reading of single training samples: caption, class, group and images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from mmpretrain.data.augment import Augmentation, augmented
from mmpretrain.data.classes import Classes, read_class
from mmpretrain.data.decode import decode_image
from mmpretrain.data.fields import check_caption_field, read_captions, read_label
from mmpretrain.data.source import SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.transforms import Transform
from mmpretrain.seeds import draw, hash64, uniform

CLASS_TEXT = "class_text"
"""Caption field of a sample whose caption is one of the texts of its class."""


class CaptionFields:
    """Caption field of each sample: one fixed field, or one drawn per sample from several.

    Args:
        fields: `txt`, `json.<path>` or `class_text`; a list of fields, drawn with equal probability; or a mapping from field
            to weight.
        key: configuration key, used in error messages.

    Raises: ValueError if there is no field, a field is malformed or a weight is not positive.
    """

    def __init__(self, fields: str | Sequence[str] | Mapping[str, float], key: str) -> None:
        weights = dict(fields) if isinstance(fields, Mapping) else dict.fromkeys(_as_list(fields), 1.0)
        if not weights or not all(isinstance(weight, int | float) and weight > 0 for weight in weights.values()):
            raise ValueError(f"{key} is {fields!r}; expected a field, a list of them, or fields with positive weights")
        for name in weights:
            check_caption_field(name, key)
        self.names = list(weights)
        self._bounds = np.cumsum(list(weights.values())) / sum(weights.values())

    def draw(self, seed: int) -> str:
        """Return the caption field of the sample with this seed."""
        if len(self.names) == 1:
            return self.names[0]
        u = uniform(hash64(seed, "caption-field"), 0)
        return self.names[min(int(np.searchsorted(self._bounds, u, side="right")), len(self.names) - 1)]


def _as_list(fields: str | Sequence[str]) -> Sequence[str]:
    return [fields] if isinstance(fields, str) else fields


@dataclass(frozen=True)
class Fields:
    """Values of one sample besides its images: caption (None without captions), group, and class (-1 without labels)."""

    caption: str | None
    group: int
    label: int


@dataclass(frozen=True)
class SampleReader:
    """Reader of the samples of one source of a stream.

    Args:
        samples: the source.
        first_id: id of the source's first sample within the stream.
        captions: caption fields; None for a stream without text.
        transform: chooses the crop of each image; None for a stream without images.
        augment: augmentations of the cropped image, applied in this order.
        views: (transform, augment) of each further view of the image; views are drawn independently.
        channels: image channels.
        max_image_bytes: memory limit for decoding one image, in bytes.
        group: value that samples of one group share: `caption`, `id`, `cls` or `json.<path>`; None for no groups.
        label: `cls` or `json.<path>`, the sample's class; None for no labels.
        classes: the classes; None if they are not known.
    """

    samples: SampleSource
    first_id: int
    captions: CaptionFields | None
    transform: Transform | None
    augment: Sequence[Augmentation]
    views: Sequence[tuple[Transform, Sequence[Augmentation]]]
    channels: int
    max_image_bytes: int
    group: str | None
    label: str | None
    classes: Classes | None

    def read(self, sample: int, seed: int, out: Sequence[Tensor]) -> Fields:
        """Return the values of a sample, and write its image and further views to `out`. Raises: BadSample."""
        caption = None
        if self.captions is not None:
            captions = self.read_captions(sample, self.captions.draw(seed))
            caption = captions[draw(hash64(seed, "caption"), 0) % len(captions)]
        if self.transform is not None:
            self.read_images(sample, seed, out)
        label = -1 if self.label is None else self.read_class(sample)
        return Fields(caption, self.read_group(sample, caption), label)

    def read_captions(self, sample: int, field: str) -> Sequence[str]:
        """Return the captions in a field; `class_text` holds the texts of the sample's class. Raises: BadSample."""
        if field == CLASS_TEXT:
            assert self.classes is not None
            return self.classes.texts[self.read_class(sample)]
        return read_captions(self.samples, sample, field)

    def read_class(self, sample: int) -> int:
        """Return the class of a sample. Raises: BadSample if it has none of the classes."""
        assert self.label is not None
        return read_class(self.samples, sample, self.label, self.classes)

    def read_images(self, sample: int, seed: int, out: Sequence[Tensor]) -> None:
        """Write the image of a sample, and as many of its further views as there is room for, to `out`.

        Args:
            sample: number of the sample.
            seed: the sample's seed.
            out: memory for the image and its views, uint8 [c, h, w] each.

        Raises: BadSample.
        """
        data = self.samples.read(sample, IMAGE_EXTENSIONS)
        assert self.transform is not None
        seeds = [seed, *(hash64(seed, "view", i) for i in range(len(self.views)))]
        views = [(self.transform, self.augment), *self.views]
        for own, (transform, augment), place in zip(seeds, views, out):
            image = decode_image(
                data, partial(transform, seed=own), place.shape[-1], self.channels, place, self.max_image_bytes
            )
            if augment:
                place.copy_(augmented(image.clone(), augment, own))  # an augmentation may return a view of its input

    def read_group(self, sample: int, caption: str | None) -> int:
        """Return the group of a sample, 64 bits. Raises: BadSample."""
        if self.group is None or self.group == "id":
            return self.first_id + sample
        if self.group == "caption":
            return hash64(caption or "")
        member = self.samples.read(sample, (self.group.split(".")[0],))
        return hash64(read_label(member, self.group))
