"""A small held-out data set in tars, and what an evaluator sees of it."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.data.classes import Classes
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shards
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.embeddings import Embedded, EvalSet
from mmpretrain.evals.zero_shot import ZeroShot
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.scores import Score
from tests import tiny
from tests.tars import write_tars

TOKENIZER = ClipTokenizer(tiny.CONTEXT_LENGTH)
LABELS = ["cat", "dog", "ant"]
BROKEN, WITHOUT_CAPTION = 4, 9
NUM_SAMPLES = 23


def pixels(number: int) -> np.ndarray:
    """The image of sample `number`, uint8 [32, 32, 3]."""
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def captions(number: int) -> list[str]:
    """One to three captions of sample `number`; some describe other samples too."""
    return [f"shared by {number % 5}", f"the {number}th of them all", "the same for all"][: number % 3 + 1]


def samples() -> list[dict[str, Any]]:
    """Every sample; the image of one does not decode, and one has no caption."""
    result: list[dict[str, Any]] = []
    for number in range(NUM_SAMPLES):
        buffer = io.BytesIO()
        Image.fromarray(pixels(number)).save(buffer, "PNG")
        fields = {"captions": captions(number), "label": LABELS[number % 3], "number": number % 3}
        if number == WITHOUT_CAPTION:
            fields["captions"] = []
        image = b"no image" if number == BROKEN else buffer.getvalue()
        result.append({"png": image, "cls": str(number % 3), "json": fields})
    return result


def make_set(folder: Path, **fields: Any) -> EvalSet:
    """All of it in three tars, which are written if they are not there."""
    paths = sorted(str(path) for path in folder.glob("*.tar")) or write_tars(folder, samples(), [9, 9, 5])
    return EvalSet("val", Shards(paths), Preprocess(tiny.IMAGE_SIZE), **{"caption": "json.captions", **fields})


def make_model() -> ImageTextModel:
    """The same random model wherever it is made."""
    torch.manual_seed(0)
    return tiny.image_text(vocab_size=TOKENIZER.vocab_size)


def make_context(model: ImageTextModel | None = None, data: EvalSet | None = None, **fields: Any) -> Context:
    """What an evaluator sees of `data` under the name `val`."""
    sets = {} if data is None else {"val": data}
    defaults = {"logit_scale": 10.0, "batch_size": 4, "workers": 0}
    return Context(model or make_model(), TOKENIZER, sets, **{**defaults, **fields})


def embedded(images: Tensor, texts: Tensor, pairs: Sequence[tuple[int, int]]) -> Embedded:
    """A data set whose embeddings are known."""
    return Embedded(
        images=F.normalize(images, dim=-1),
        features=images,
        texts=F.normalize(texts, dim=-1),
        text_features=texts,
        captions=[f"text {number}" for number in range(len(texts))],
        samples=torch.arange(len(images)),
        pairs=torch.tensor(pairs),
        labels=torch.full((len(images),), -1),
        fields={},
        refused=[],
    )


def many_images(folder: Path, num_images: int = 50_001, num_classes: int = 40) -> Context:
    """Random embeddings with labels; to compare them with the classes costs more than to embed the classes' texts."""
    classes = Classes([f"class {i}" for i in range(num_classes)], [[f"{i}"] for i in range(num_classes)])
    generator = torch.Generator().manual_seed(0)
    data = embedded(torch.randn(num_images, 12, generator=generator), torch.zeros(0, 12), [])
    data.labels.copy_(torch.randint(0, num_classes, (num_images,), generator=generator))
    return make_context(data=make_set(folder, label="cls", classes=classes), _embedded={"val": data})


def classify_many(folder: Path) -> tuple[dict[str, Score], dict[str, str], int]:
    """Return (scores, hashes of the pictures, number of operations) of zero-shot classification on this rank."""
    context = many_images(folder)
    with FlopCounterMode(display=False) as counter:
        scores = evaluate({"zero_shot": ZeroShot()}, context)
    pictures = {name: hashlib.sha256(pixels.tobytes()).hexdigest() for name, pixels in context.shown.pictures.items()}
    return scores, pictures, counter.get_total_flops()
