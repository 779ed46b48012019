"""Classification of labelled images or texts by a linear layer: fine-tuning, and supervised pre-training."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.data.classes import Classes
from mmpretrain.errors import check_number
from mmpretrain.models.evaluation_mode import in_evaluation_mode
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Decode, Encodings, Example, TokenIds

_TEXTS_AT_ONCE = 256
_SHOWN = 3


class Classification(nn.Module):
    """Cross-entropy of a linear classifier on an encoder's output.

    With `features` = `pooled` the logits are W x + b of the pooled states x. With `embedding` they are s W x of the
    embeddings x of unit length, with a learned scale s, and `head` = `zero_shot` begins with the zero-shot classifier: the
    rows of W are the mean embeddings of the texts of each class (Wortsman et al. 2022, 'Robust fine-tuning of zero-shot
    models', section 2).

    An image that is mixed with another one by share m (see `data.train.<stream>.mix`) has the loss
    (1 - m) CE(logits, y) + m CE(logits, y'), which is the cross-entropy with timm's soft targets.

    Args:
        model: the model.
        classes: classes of the stream, from `data.train.<stream>.classes`.
        num_classes: number of classes; None: that of `classes`.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
        features: `pooled` or `embedding`.
        head: `random`, or `zero_shot` for the embeddings of the classes' texts.
        init_logit_scale: initial value of s, if `init_from` has none.
        dropout: probability of dropping a feature before the classifier.
        tower: `image`, or `text` for the classification of texts.
        stream: data stream of the labelled samples.

    Raises: ValueError if the number of classes is not known, or a number is out of range, or the zero-shot classifier lacks
        texts or embeddings.
    """

    def __init__(
        self,
        model: ImageTextModel,
        classes: Classes | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        features: Literal["pooled", "embedding"] = "pooled",
        head: Literal["random", "zero_shot"] = "random",
        init_logit_scale: float = 1 / 0.07,
        dropout: float = 0.0,
        tower: Literal["image", "text"] = "image",
        stream: str = "pairs",
        config_path: str = "objective.classification",
    ) -> None:
        super().__init__()
        if classes is None and num_classes is None:
            raise ValueError(
                f"{config_path}: the number of classes is not known; set data.train.{stream}.classes to the list of classes, "
                f"or {config_path}.num_classes"
            )
        if classes is not None and num_classes not in (None, len(classes.names)):
            raise ValueError(
                f"{config_path}.num_classes is {num_classes}, but data.train.{stream}.classes has {len(classes.names)}; "
                "expected the same: leave num_classes null"
            )
        self.num_classes: int = len(classes.names) if classes is not None else num_classes or 0
        check_number(f"{config_path}.num_classes", self.num_classes, at_least=2)
        check_number(f"{config_path}.label_smoothing", label_smoothing, at_least=0, below=1)
        check_number(f"{config_path}.dropout", dropout, at_least=0, below=1)
        check_number(f"{config_path}.init_logit_scale", init_logit_scale, above=0)
        if head == "zero_shot" and (features != "embedding" or classes is None or model.text is None):
            raise ValueError(
                f"{config_path}.head is 'zero_shot', which needs {config_path}.features=embedding, a text encoder, and "
                f"data.train.{stream}.classes; expected them, or {config_path}.head=random"
            )
        self.streams, self._config_path, self.reads_mixed = (stream,), config_path, True
        self.class_names = None if classes is None else classes.names
        self._texts = classes.texts if head == "zero_shot" and classes is not None else None
        self.tower, self.features, self._label_smoothing = tower, features, label_smoothing
        encoder = model.image_encoder if tower == "image" else model.text_encoder
        self.dropout = nn.Dropout(dropout)
        is_pooled = features == "pooled"
        self.head = nn.Linear(
            encoder.width if is_pooled else _embed_dim(model, tower), self.num_classes, bias=is_pooled
        )
        nn.init.normal_(self.head.weight, std=0.01)
        if is_pooled:
            nn.init.zeros_(self.head.bias)
        else:
            self.logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))

    def set_tokenizer(self, tokenizer: TokenIds) -> None:
        """Tokenize the texts of the classes for the zero-shot classifier."""
        if self._texts is not None:
            self._tokens = [tokenizer(list(texts)) for texts in self._texts]

    @torch.no_grad()
    def after_init(self, model: ImageTextModel) -> None:
        """Set the classifier to the zero-shot one of the model's initial weights."""
        if self._texts is None:
            return
        with in_evaluation_mode(model):
            rows = [
                torch.cat(
                    [model.embed_texts(*part) for part in zip(ids.split(_TEXTS_AT_ONCE), lengths.split(_TEXTS_AT_ONCE))]
                )
                for ids, lengths in self._tokens
            ]
        self.head.weight.copy_(F.normalize(torch.stack([of_class.mean(0) for of_class in rows]), dim=-1))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of labelled samples of a micro-batch. Raises: ValueError for a label that is no class."""
        (stream,) = self.streams
        labels, mixed = batch.labels(stream), batch.streams[stream].mixed_labels
        largest = max((int(each.max()) for each in (labels, mixed) if each is not None and len(each)), default=0)
        if largest >= self.num_classes:
            raise ValueError(
                f"data.train.{stream} has label {largest}, but {self._config_path}.num_classes is {self.num_classes}; "
                f"expected labels from 0 to {self.num_classes - 1}"
            )
        return torch.tensor(len(labels))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [b, C] of pooled states or embeddings [b, d], in the precision of the head, at least float32."""
        features = self.dropout(features.to(self.head.weight.dtype))
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits * self.logit_scale.exp() if self.features == "embedding" else logits

    def loss(self, encodings: Encodings) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the cross-entropy over the samples, and the number of right predictions as `accuracy`."""
        (stream,) = self.streams
        labels, samples = encodings.batch.labels(stream), encodings.samples(stream)
        logits = self._logits(encodings)
        loss = self._cross_entropy(logits, labels)
        if samples.mixed_labels is not None and samples.mixed_shares is not None:
            loss = torch.lerp(
                loss, self._cross_entropy(logits, samples.mixed_labels), samples.mixed_shares.to(loss.dtype)
            )
        return loss.sum(), {"accuracy": (logits.argmax(1) == labels).sum()}

    def examples(self, encodings: Encodings, decode: Decode) -> list[Example]:
        """Return each sample's image, if it has one, with its class and the three most probable classes."""
        (stream,) = self.streams
        most = self._logits(encodings).softmax(1).topk(min(_SHOWN, self.num_classes))
        images = encodings.samples(stream).images
        shown = []
        for i, label in enumerate(encodings.batch.labels(stream).tolist()):
            guesses = zip(most.indices[i].tolist(), most.values[i].tolist())
            text = ", ".join(f"{self._name(each)} ({share:.0%})" for each, share in guesses)
            picture = [] if images is None or images.shape[1] != 3 else [images[i].cpu()]
            shown.append(Example(picture, f"{self._name(label)}; predicted: {text}"))
        return shown

    def _name(self, label: int) -> str:
        return str(label) if self.class_names is None else self.class_names[label]

    def _logits(self, encodings: Encodings) -> Tensor:
        (stream,) = self.streams
        if self.features == "pooled":
            encoding = encodings.image(stream) if self.tower == "image" else encodings.text(stream)
            return self.logits(encoding.pooled)
        embed = encodings.image_embedding if self.tower == "image" else encodings.text_embedding
        return self.logits(embed(stream))

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self._label_smoothing)


def _embed_dim(model: ImageTextModel, tower: Literal["image", "text"]) -> int:
    return model.image_embed_dim if tower == "image" else model.text_embed_dim
