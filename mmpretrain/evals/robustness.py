"""Zero-shot classification of corrupted images, as ImageNet-C asks (Hendrycks & Dietterich 2019)."""

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from mmpretrain import distributed, seeds
from mmpretrain.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mmpretrain.errors import UsageError, check_number, nearest
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.class_scores import right_class_ranks
from mmpretrain.evals.embeddings import EvalSet, read_image
from mmpretrain.evals.shared_images import shared_images
from mmpretrain.evals.zero_shot import class_embeddings
from mmpretrain.scores import Score, mean_score


class Robustness:
    """Classify images under corruptions that are made on the spot, from the preprocessed image.

    See `mmpretrain.data.corruptions` for what differs from the published files. The noise of an image depends on its number
    in the data set alone. An image costs len(corruptions) x len(severities) forward passes and corruptions: all 75 of these
    take about .1 s of a core at 64 pixels and .5 s at 224, shared by the decoding processes.

    Args:
        data: names of `data.val` to use; None uses each data set with `classes` and `label`.
        corruptions: names of the corruptions; None: all fifteen.
        severities: severities from 1 to 5.
        max_samples: largest number of images, spread evenly over the data set; None: all.

    Raises: UsageError if a corruption is unknown, or a number is out of range.
    """

    needs = "label and classes"

    def __init__(
        self,
        data: Sequence[str] | None = None,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = SEVERITIES,
        max_samples: int | None = 100,
    ) -> None:
        self.corruptions = list(CORRUPTIONS) if corruptions is None else list(corruptions)
        for key, chosen in (("corruptions", self.corruptions), ("severities", severities)):
            if not chosen or len(set(chosen)) < len(chosen):
                raise UsageError(f"{key} is {list(chosen)}; expected at least one, and each once")
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise UsageError(f"corruptions has {name!r}; {nearest(str(name), list(CORRUPTIONS))}")
        for severity in severities:
            check_number("severities", severity, at_least=1, at_most=5)
        if max_samples is not None:
            check_number("max_samples", max_samples, at_least=1)
        self.data = data
        self.severities = severities
        self.max_samples = max_samples

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with classes and labels."""
        return context.classified_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `corrupted_acc1`, also by corruption and by severity, and how far it is below the clean accuracy.

        - `corrupted_acc1`: mean over images, corruptions and severities.
        - `corrupted_acc1_<corruption>`: mean over images and severities.
        - `corrupted_acc1@<severity>`: mean over images and corruptions.
        - `corrupted_acc1_drop`: accuracy on the same images without corruption, minus `corrupted_acc1`.
        """
        data, embedded = context.sets[name], context.embedded(name)
        assert data.classes is not None and data.preprocess is not None
        weights = class_embeddings(data.classes, context)
        rows = evenly_spread(self.max_samples, len(embedded.images))
        labels = embedded.labels[rows]
        variants = [(corruption, severity) for corruption in self.corruptions for severity in self.severities]
        read = _ReadCorrupted(data, embedded.samples[rows].tolist(), variants)
        hits = [torch.zeros(0, dtype=torch.bool, device=labels.device)]
        with closing(shared_images(context, data.preprocess, read, len(rows) * len(variants))) as batches:
            for batch in batches:
                items = torch.tensor(batch.samples, device=labels.device)
                with context.autocast:
                    images = context.model.embed_images(batch.images)
                hits.append(right_class_ranks(images.float() @ weights.T, labels[items // len(variants)]) < 1)
        all_hits = distributed.gather_ragged_rows(torch.cat(hits)).double()
        all_hits = all_hits.reshape(len(rows), len(self.corruptions), len(self.severities))
        clean = (right_class_ranks(embedded.images[rows] @ weights.T, labels) < 1).double()
        means = all_hits.mean((1, 2))
        return {
            "corrupted_acc1": mean_score(means, labels),
            "corrupted_acc1_drop": mean_score(clean - means, labels),
            **{
                f"corrupted_acc1@{severity}": mean_score(all_hits[:, :, i].mean(1), labels)
                for i, severity in enumerate(self.severities)
            },
            **{
                f"corrupted_acc1_{corruption}": mean_score(all_hits[:, i].mean(1), labels)
                for i, corruption in enumerate(self.corruptions)
            },
        }


class _ReadCorrupted:
    """Function that reads corrupted images. Consecutive items are the variants of a sample, which is decoded once.

    Args:
        data: data set.
        samples: numbers of the samples.
        variants: (corruption, severity) of each variant.
    """

    def __init__(self, data: EvalSet, samples: Sequence[int], variants: Sequence[tuple[str, int]]) -> None:
        self._data, self._samples, self._variants = data, samples, variants
        self._last: tuple[int, Tensor] | None = None

    def __call__(self, item: int, out: Tensor) -> None:
        number, variant = divmod(item, len(self._variants))
        sample = self._samples[number]
        if self._last is None or self._last[0] != sample:
            self._last = sample, read_image(self._data, sample)
        image = self._last[1].permute(1, 2, 0).numpy()
        corruption, severity = self._variants[variant]
        pixels = corrupt(image, corruption, severity, seeds.hash64("robustness", sample))
        out.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
