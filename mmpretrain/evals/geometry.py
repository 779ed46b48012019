"""Geometry of the embeddings: alignment, uniformity, modality gap and effective rank."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.embeddings import check_several
from mmpretrain.scores import Score, mean_score

_CHUNK = 1024


def uniformity(rows: Tensor, t: float = 2.0) -> float:
    """Return log E exp(-t |x - y|^2) over the pairs of different rows (Wang & Isola 2020, equation 2).

    Args:
        rows: embeddings of unit length [n, e], n >= 2.
        t: t of the Gaussian kernel.
    """
    total = -torch.inf * torch.ones((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].double()
        exponents = -t * (2 - 2 * part @ rows.double().T).clamp(min=0)
        exponents[torch.arange(len(part)), start + torch.arange(len(part))] = -torch.inf
        total = torch.logaddexp(total, exponents.logsumexp((0, 1)))
    return float(total) - math.log(len(rows) * (len(rows) - 1))


def rank_me(rows: Tensor, epsilon: float = 1e-7) -> float:
    """Return exp(-sum_k p_k log p_k), p_k = sigma_k / |sigma|_1 + epsilon (RankMe, Garrido et al. 2023, equation 1).

    Args:
        rows: embeddings [n, e], with singular values sigma.
        epsilon: epsilon of the equation.

    Returns: float from 1 to min(n, e); NaN if an embedding is not finite.
    """
    if not bool(rows.isfinite().all()):  # which have no singular values
        return math.nan
    singular = torch.linalg.svdvals(rows.double())
    p = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + epsilon
    return float((-(p * p.log()).sum()).exp())


class Geometry:
    """Compute the geometry of image and text embeddings.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        max_samples: largest number of images, spread evenly over the data set, and of their first captions; the cost grows
            with its square.

    Raises: UsageError if `max_samples` is below 2.
    """

    needs = "caption, of several samples"

    def __init__(self, data: Sequence[str] | None = None, max_samples: int = 10_000) -> None:
        check_number("max_samples", max_samples, at_least=2)
        self.data = data
        self.max_samples = max_samples

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with images, captions and at least two samples."""
        return [name for name in context.pair_sets if context.sets[name].shards.num_samples > 1]

    def __call__(self, name: str, context: Context) -> dict[str, Score | float]:
        """Return the metrics below; lower is better for `alignment` and `*_uniformity`.

        - `alignment`: mean squared distance of an image and its first caption (Wang & Isola 2020).
        - `image_uniformity`, `text_uniformity`: see `uniformity`.
        - `modality_gap`: distance of the mean image and the mean text embedding (Liang et al. 2022).
        - `image_rankme`, `text_rankme`, `feature_rankme`: see `rank_me`; of the embeddings, and of the image encoder's pooled
          states.

        Raises: UsageError if a single image can be read.
        """
        embedded = context.embedded(name)
        check_several(name, embedded)
        rows = evenly_spread(self.max_samples, len(embedded.images))
        images, features = embedded.images[rows], embedded.features[rows]
        texts = embedded.texts[[embedded.first_texts[row] for row in rows]]
        return {
            "alignment": mean_score((images - texts).double().square().sum(1), embedded.labels[rows]),
            "image_uniformity": uniformity(images),
            "text_uniformity": uniformity(texts),
            "modality_gap": float((images.double().mean(0) - texts.double().mean(0)).norm()),
            "image_rankme": rank_me(images),
            "text_rankme": rank_me(texts),
            "feature_rankme": rank_me(features),
        }
