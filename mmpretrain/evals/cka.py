"""Similarity of the layers of two models: linear centred kernel alignment (Kornblith et al. 2019)."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import UsageError, check_number
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.embeddings import EvalSet, num_batches
from mmpretrain.evals.layer_states import image_layers, text_layers
from mmpretrain.evals.shared_images import ReadSamples, shared_images
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.reporting.heat_matrix import heat_matrix

_CONSTANT = 1e-6  # relative deviation that float32 rounding alone can cause


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> np.ndarray:
    """Return |Y'X|_F^2 / (|X'X|_F |Y'Y|_F) of centred features (Kornblith et al. 2019, equation 7), in float64.

    Args:
        xs, ys: features of the same n samples in each layer, [n, p] and [n, q].

    Returns: float64 [len(xs), len(ys)], from 0 to 1; 0 where either is constant over the samples, NaN where either is not
        finite.
    """
    centred_xs, centred_ys = ([_centred(each) for each in layers] for layers in (xs, ys))
    products = np.array([[_product(x, y) for y in centred_ys] for x in centred_xs])
    norms_x, norms_y = (np.array([_product(x, x) for x in layers]) ** 0.5 for layers in (centred_xs, centred_ys))
    norms = norms_x[:, None] * norms_y
    return np.divide(products, norms, out=np.zeros_like(products), where=norms != 0)


def _centred(x: Tensor) -> Tensor:
    """Return features minus their mean, at norm 1, float64; zeros if they are constant up to rounding."""
    rows = x.double()
    centred = rows - rows.mean(0)
    norm = centred.norm()
    return torch.zeros_like(centred) if norm <= _CONSTANT * rows.norm() else centred / norm  # NaN stays NaN


def _product(x: Tensor, y: Tensor) -> float:
    """Return |Y'X|_F^2, by the smaller one of the products [q, p] and [n, n]."""
    if len(x) ** 2 < x.shape[1] * y.shape[1]:
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float((y.T @ x).square().sum())


@dataclass(frozen=True)
class _Side:
    """One of the two models, with its own view of the data set."""

    model: ImageTextModel
    tokenizer: Tokenizer
    data: EvalSet


class CKA:
    """Compare the layers of the model with those of another checkpoint, on the same images and captions.

    A layer is a block's output, averaged over tokens; the last one, `pooled`, is the encoder's pooled state before the
    projection. Each model has its own preprocessing and tokenizer. All layers' states are kept, n x (sum of widths) float32,
    and the products of each pair of layers cost n x width^2.

    Args:
        other: a run's directory or checkpoint, `open_clip:` or `timm:`, as `mmpretrain.evaluate` takes it.
        data: names of `data.val` to use; None uses each data set with images or captions that both models can embed.
        max_samples: largest number of images, and of captions, spread evenly over the data set; None: all.
        ema: compare with the moving average of the other checkpoint's weights.
        trust: names that the other checkpoint's configuration may use, as in `mmpretrain.evaluate`.

    Raises: UsageError if `max_samples` is below 2; ValueError if the checkpoint cannot be loaded.
    """

    needs = "images or a caption, of several samples"
    towers = ()

    def __init__(
        self,
        other: str | None,
        data: Sequence[str] | None = None,
        max_samples: int | None = 2048,
        ema: bool = False,
        trust: Sequence[str] = (),
    ) -> None:
        if other is None:
            raise UsageError("other is null; expected a checkpoint to compare with: eval.cka.other=RUN")
        if max_samples is not None:
            check_number("max_samples", max_samples, at_least=2)
        self.data = data
        self.max_samples = max_samples
        self._other = load_checkpoint(other, "cpu", trust, ema)

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with at least two samples that both models can embed."""
        return [
            name
            for name, data in context.sets.items()
            if data.shards.num_samples > 1 and (self._compares_images(data) or self._compares_texts(data, context))
        ]

    def _compares_images(self, data: EvalSet) -> bool:
        return data.preprocess is not None and self._other.preprocess is not None

    def _compares_texts(self, data: EvalSet, context: Context) -> bool:
        return data.caption is not None and context.model.text is not None and self._other.model.text is not None

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Return `cka_image_final` and `cka_image`, and `cka_text_final` and `cka_text`; show the pictures `cka_*`.

        `cka_*_final` compares the pooled states; `cka_*` is the mean over blocks of the same number, of two encoders with as
        many blocks. A tower that one of the models lacks has no score. Rows of a picture are layers of this model, columns
        those of the other one.
        """
        data, device = context.sets[name], context.model.device
        other = self._other.model.to(device)
        own = _Side(context.model, context.tokenizer, data)
        others = _Side(other, self._other.tokenizer, replace(data, preprocess=self._other.preprocess))
        embedded = context.embedded(name)
        layers = {}
        if self._compares_images(data):
            samples = embedded.samples[evenly_spread(self.max_samples, len(embedded.images))].tolist()
            layers["image"] = [self._of_images(side, samples, context) for side in (own, others)]
        if self._compares_texts(data, context):
            texts = [embedded.captions[row] for row in evenly_spread(self.max_samples, len(embedded.captions))]
            layers["text"] = [self._of_texts(side, texts, context) for side in (own, others)]
        other.to("cpu")  # between evaluations the memory is the training's
        scores: dict[str, float] = {}
        for tower, (rows, columns) in layers.items():
            matrix = cka_matrix(rows, columns)
            scores[f"cka_{tower}_final"] = matrix[-1, -1]
            if len(rows) == len(columns):
                scores[f"cka_{tower}"] = matrix.diagonal()[:-1].mean()
            if distributed.is_main():
                down, right = ([*range(1, len(side)), "pooled"] for side in (rows, columns))
                context.show(name, f"cka_{tower}", heat_matrix(matrix, down, right, "this model", "other"))
        return scores

    def _of_images(self, side: _Side, samples: Sequence[int], context: Context) -> list[Tensor]:
        """Return the states of each layer, float32 [n, d]. A collective."""
        assert side.data.preprocess is not None
        parts = []
        read = ReadSamples(side.data, samples)
        with closing(shared_images(context, side.data.preprocess, read, len(samples))) as batches:
            for batch in batches:
                with context.autocast:
                    parts.append(image_layers(side.model, batch.images.to(context.model.device)))
        return _gathered(parts, context.model.device)

    def _of_texts(self, side: _Side, texts: Sequence[str], context: Context) -> list[Tensor]:
        """Return the states of each layer, float32 [m, d]. A collective."""
        mine, parts = texts[distributed.share(len(texts))], []
        for i in range(num_batches(len(texts), context.batch_size)):
            context.check_stop()
            if some := mine[i * context.batch_size : (i + 1) * context.batch_size]:
                ids, lengths = (each.to(context.model.device) for each in side.tokenizer(some))
                with context.autocast:
                    parts.append(text_layers(side.model, ids, lengths))
        return _gathered(parts, context.model.device)


def _gathered(parts: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Join the layers' states [b, d] of this rank's batches and of all ranks, in their order. A collective."""
    widths = next(filter(None, distributed.gather_objects([each.shape[1] for each in parts[0]] if parts else [])))
    none = [torch.zeros(0, width, device=device) for width in widths]  # a rank may have no batch
    return [distributed.gather_ragged_rows(torch.cat(layer)) for layer in zip(none, *parts)]
