"""The model and its objectives as one module, whose forward pass computes all losses of a micro-batch."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mmpretrain.batch import Batch, Samples
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec, PatchMask, TokenMask, TokenMaskSpec, mask_tokens, patch_mask
from mmpretrain.objectives.base import Couple, CoupledObjective, IndependentObjective, Objective, hooks_of
from mmpretrain.schedules import TrainingProgress
from mmpretrain.training.randomness import SampleRandomness


class Encodings:
    """Encoder outputs of one micro-batch, computed when an objective first requests them and then cached.

    Args:
        model: model with the encoders.
        batch: the micro-batch.
        num_terms: number of the micro-batch's terms, by objective.
        random: mode that supplies the random numbers of layers such as dropout; None uses PyTorch's generator.
    """

    def __init__(
        self,
        model: ImageTextModel,
        batch: Batch,
        num_terms: Mapping[IndependentObjective, int] | None = None,
        random: SampleRandomness | None = None,
    ) -> None:
        self.batch = batch
        self._model = model
        self._num_terms = num_terms or {}
        self._random = random
        self._pixels: dict[tuple[str, int | None], Tensor] = {}
        self._masks: dict[tuple[str, MaskSpec], PatchMask] = {}
        self._images: dict[tuple[str, MaskSpec | None], Encoding] = {}
        self._views: dict[tuple[str, int], Encoding] = {}
        self._token_masks: dict[tuple[str, TokenMaskSpec], TokenMask] = {}
        self._texts: dict[tuple[str, TokenMaskSpec | None], Encoding] = {}

    def samples(self, stream: str) -> Samples:
        """Return the stream's part of the micro-batch."""
        return self.batch.streams[stream]

    def num_terms(self, objective: IndependentObjective) -> int | None:
        """Return the number of the micro-batch's terms of an objective, or None if it was not counted on the host."""
        return self._num_terms.get(objective)

    def pixels(self, stream: str, view: int | None = None) -> Tensor:
        """Return the normalised images [b, 3, h, w], or those of one of the stream's own views.

        Raises: ValueError if the stream has too few views.
        """
        if (stream, view) not in self._pixels:
            images = self.batch.images(stream) if view is None else self._view(stream, view)
            self._pixels[stream, view] = self._model.normalize(images)
        return self._pixels[stream, view]

    def patch_mask(self, stream: str, spec: MaskSpec) -> PatchMask:
        """Return the patch mask that `spec` draws for each sample of the stream."""
        if (stream, spec) not in self._masks:
            grid_size = self.batch.grid_size(stream, self._model.image_encoder.patch_size)
            self._masks[stream, spec] = patch_mask(self.samples(stream).seeds, grid_size, spec)
        return self._masks[stream, spec]

    def image(self, stream: str, mask: MaskSpec | None = None) -> Encoding:
        """Return the image encoder's output, for all patches or only for those that `mask` keeps."""
        if (stream, mask) not in self._images:
            patch_mask = None if mask is None else self.patch_mask(stream, mask)
            encode = partial(self._model.image_encoder, self.pixels(stream), patch_mask)
            self._images[stream, mask] = _encoded(encode, self._drawing(stream, "image", mask))
        return self._images[stream, mask]

    def view(self, stream: str, number: int) -> Encoding:
        """Return the image encoder's output for one of the stream's own views.

        Raises: ValueError if the stream has too few views.
        """
        if (stream, number) not in self._views:
            encode = partial(self._model.image_encoder, self.pixels(stream, number))
            self._views[stream, number] = _encoded(encode, self._drawing(stream, "view", number))
        return self._views[stream, number]

    def _view(self, stream: str, number: int) -> Tensor:
        views = self.samples(stream).views
        if views is None or number >= views.shape[1]:
            raise ValueError(
                f"data.train.{stream}.views has too few for an objective that reads number {number + 1}; expected as "
                "many {transform: ...} as its num_views, such as those that conf/objective/simclr.yaml gives to pairs"
            )
        return views[:, number]

    def token_mask(self, stream: str, spec: TokenMaskSpec) -> TokenMask:
        """Return the token mask that `spec` draws for each text of the stream."""
        if (stream, spec) not in self._token_masks:
            text, lengths = self.batch.texts(stream)
            samples = self.samples(stream)
            self._token_masks[stream, spec] = mask_tokens(text, lengths, samples.seeds, spec, samples.word_starts)
        return self._token_masks[stream, spec]

    def text(self, stream: str, mask: TokenMaskSpec | None = None) -> Encoding:
        """Return the text encoder's output, with the tokens hidden that `mask` draws if it is given."""
        if (stream, mask) not in self._texts:
            text, lengths = self.batch.texts(stream)
            ids = text if mask is None else self.token_mask(stream, mask).ids
            encode = partial(self._model.encode_text, ids, lengths, self.samples(stream).packing)
            self._texts[stream, mask] = _encoded(encode, self._drawing(stream, "text", mask))
        return self._texts[stream, mask]

    def _drawing(self, stream: str, *key: object) -> Callable[[], AbstractContextManager[None]]:
        """Return a function that makes the random-number context of a pass over a stream's samples."""
        if self._random is None:
            return nullcontext
        return partial(self._random.of, self.samples(stream), stream, *key)

    @property
    def token_embeddings(self) -> Tensor:
        """Token embedding matrix of the text encoder, [vocabulary, d], which heads tie to (Press and Wolf 2017)."""
        return self._model.text_encoder.token_embeddings

    def with_text(self, stream: str, text: Tensor, lengths: Tensor) -> "Encodings":
        """Return the same micro-batch with other texts for the stream's images. Cached image encodings are shared."""
        samples = replace(self.samples(stream), text=text, lengths=lengths, packing=None)
        other = Encodings(self._model, replace(self.batch, streams={**self.batch.streams, stream: samples}))
        other._pixels, other._masks, other._images = self._pixels, self._masks, self._images
        return other

    def to_images(self, pixels: Tensor) -> Tensor:
        """Convert normalised pixels [b, 3, h, w] to uint8 images."""
        return self._model.denormalize(pixels)

    def image_embedding(self, stream: str, mask: MaskSpec | None = None) -> Tensor:
        """Return the image embeddings [b, e] of unit length, of all patches or only of those that `mask` keeps."""
        pooled = self.image(stream, mask).pooled
        with self._drawing(stream, "image", mask)():
            return self._model.project_image(pooled)

    def text_embedding(self, stream: str) -> Tensor:
        """Return the text embeddings [b, e] of unit length."""
        pooled = self.text(stream).pooled
        with self._drawing(stream, "text", None)():
            return self._model.project_text(pooled)


def _encoded(encode: Callable[[], Encoding], drawing: Callable[[], AbstractContextManager[None]]) -> Encoding:
    """Run an encoder in `drawing()`, in which the lazy parts of its output are also computed."""
    with drawing():
        encoding = encode()
    if drawing is nullcontext:
        return encoding

    def tokens() -> Tensor:
        with drawing():
            return encoding.tokens

    def pooled(_: Encoding) -> Tensor:
        with drawing():
            return encoding.pooled

    return Encoding(tokens, pooled)


class Task(nn.Module):
    """Module that DDP and FSDP wrap: one call computes all losses of a micro-batch."""

    def __init__(self, model: ImageTextModel, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.model = model
        self.objectives: Mapping[str, Objective] = nn.ModuleDict(objectives)  # type: ignore[assignment, arg-type]
        self.randomness: Callable[[], SampleRandomness] | None = partial(SampleRandomness, strict=False)
        """Factory of a forward pass's random-number mode; None without random layers (see `settle_randomness`)."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the objectives read, in the objectives' order."""
        return tuple(dict.fromkeys(stream for objective in self.objectives.values() for stream in objective.streams))

    def num_views(self, stream: str) -> int:
        """Return the number of a stream's own views that the objectives read. Further views are not decoded."""
        readers = (objective for objective in self.objectives.values() if stream in objective.streams)
        return max((hooks_of(objective).num_views for objective in readers), default=0)

    def coupled(self, name: str) -> CoupledObjective:
        """Return the coupled objective `name`."""
        objective = self.objectives[name]
        assert not isinstance(objective, IndependentObjective)
        return objective

    @property
    def logit_scale(self) -> float | None:
        """Scale (1 / temperature) of the first objective with a learned `logit_scale`, or None. Synchronises."""
        for objective in self.objectives.values():
            if hasattr(objective, "logit_scale"):
                return float(objective.logit_scale.detach().exp())
        return None

    @property
    def independent(self) -> dict[str, IndependentObjective]:
        """Independent objectives by name."""
        return {name: each for name, each in self.objectives.items() if isinstance(each, IndependentObjective)}

    def counted(self, batch: Batch, weights: Mapping[str, float]) -> Batch:
        """Return the micro-batch with the number of its terms for each independent objective of non-zero weight.

        Synchronises if the micro-batch is on the device and was not counted before the transfer.
        """
        missing = {name: each for name, each in self.independent.items() if weights[name] and name not in batch.counts}
        counts = {name: objective.count(batch).item() for name, objective in missing.items()}
        return replace(batch, counts={**batch.counts, **counts})

    def forward(
        self, batch: Batch, weights: Mapping[str, float], counts: Mapping[str, Tensor], couple: Couple
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Compute one micro-batch's part of the step's loss.

        total = sum_k w_k * (loss_k / counts_k                       for an independent objective k,
                             <rows, d rows> + <shared, d shared>     for a coupled one)

        Args:
            batch: the micro-batch.
            weights: weight w_k of each objective; those of weight 0 are not computed.
            counts: number of terms in the whole batch, by independent objective.
            couple: function that returns the gradients with respect to a coupled objective's rows and scalars.

        Returns: a scalar whose gradients are this micro-batch's part of the step's gradients, and the sums of each
            independent objective: `loss` and its further values.
        """
        torch.manual_seed(batch.seed)  # for layers that do not draw by sample
        independent = self.independent
        num_terms = {independent[name]: int(count) for name, count in batch.counts.items()}
        total = torch.zeros((), device=next(self.parameters()).device)
        sums: dict[str, dict[str, Tensor]] = {}
        with nullcontext() if self.randomness is None else self.randomness() as random:
            encodings = Encodings(self.model, batch, num_terms, random)
            # Coupled objectives come first in every pass: a pass without the others then computes the same rows.
            for name in sorted(self.objectives, key=lambda name: name in independent):
                objective = self.objectives[name]
                if not weights[name]:
                    continue
                samples = batch.streams[objective.streams[0]]
                drawing = nullcontext() if random is None else random.of(samples, "objective", name)
                if isinstance(objective, IndependentObjective):
                    with drawing:
                        terms = objective.loss(encodings)
                    loss, others = terms if isinstance(terms, tuple) else (terms, {})
                    sums[name] = {key: value.detach() for key, value in {"loss": loss, **others}.items()}
                    share = loss / counts[name].to(loss.dtype)
                else:
                    with drawing:
                        rows, shared = objective.embed(encodings)
                    d_rows, d_shared = couple(name, rows, shared)
                    share = _inner((rows, d_rows), (shared, d_shared))
                total = total + weights[name] * share
        return total, sums

    def after_init(self) -> None:
        """Call the objectives' `after_init` hooks. The model must have its initial weights."""
        for objective in self.objectives.values():
            hooks_of(objective).after_init(self.model)

    def after_step(self, progress: TrainingProgress, skipped: Tensor) -> None:
        """Call the objectives' `after_step` hooks.

        Args:
            progress: samples seen before the step.
            skipped: 1 if the step was skipped, else 0; float32 scalar.
        """
        for objective in self.objectives.values():
            hooks_of(objective).after_step(self.model, progress, skipped)


def _inner(*pairs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Tensor:
    """Sum the products of values and gradients of the same names; an objective may have no shared tensors."""
    products = [(values[name] * gradient).sum() for values, gradients in pairs for name, gradient in gradients.items()]
    return torch.stack(products).sum()
