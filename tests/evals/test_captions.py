"""Generated captions and CIDEr, against a few lines of NumPy and COCO's own tokenizer."""

import copy
import hashlib
import math
import shutil
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shards
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.captions import Captions
from mmpretrain.evals.cider import cider
from mmpretrain.evals.embeddings import EvalSet
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.captioning import Captioning
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.scores import Score
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.evals.held_out import TOKENIZER, make_context, make_set
from tests.tars import encode, write_tars

REFERENCES = [
    ["a red apple", "A fresh, red apple on a table."],
    ["two dogs that play"],
    ["a red car", "the fast car", "a car in the street at night"],
    ["the street at night"],
]


def expected_cider(candidate: str, own: list[str], every: list[list[str]]) -> float:
    """Equations 1 to 4 of Vedantam et al. 2015 for one image, with CIDEr-D's clipping and penalty of lengths."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.lower().replace(",", "").replace(".", "").split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in range(1, 5):
        frequency = Counter(gram for texts in every for gram in {gram for text in texts for gram in grams(text, n)})
        idf = {gram: math.log(len(every)) - math.log(count) for gram, count in frequency.items()}

        def weights(text: str, n: int = n, idf: dict[Any, float] = idf) -> dict[tuple[str, ...], float]:
            return {gram: count * idf.get(gram, math.log(len(every))) for gram, count in grams(text, n).items()}

        for text in own:
            a, b = weights(candidate), weights(text)
            product = sum(min(value, b.get(gram, 0)) * b.get(gram, 0) for gram, value in a.items())
            norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
            longer = sum(grams(candidate, 2).values()) - sum(grams(text, 2).values())
            total += (product / norm if norm else 0) * math.exp(-(longer**2) / 72) / 4 / len(own)
    return 10 * total


def test_cider_is_that_of_its_equations() -> None:
    candidates = ["a red apple on the table", "two dogs that play", "the car at night", "nothing of this"]
    found = cider(candidates, REFERENCES, "words")
    expected = [expected_cider(text, own, REFERENCES) for text, own in zip(candidates, REFERENCES, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert found[1] == pytest.approx(10) and found[3] == 0 and 0 < found[2] < 10


def test_one_caption_for_all_images_scores_next_to_nothing() -> None:
    references = [[f"object {i} of kind {i % 7}"] for i in range(100)]
    for caption in (references[3][0], "object of kind", "", "the"):
        assert cider([caption] * 100, references, "words").mean() < 0.6
    assert cider([own[0] for own in references], references, "words").mean() == pytest.approx(10)
    assert cider(["a", "b"], [["…"], ["!"]], "words").tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_ptb_splits_as_the_package_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    candidates = ["A dog's red-eyed owner (27)!", "don't \n stop: it's $5", "", "naïve café – “quoted”"]
    references = [[text.upper(), "another one, isn't it?"] for text in candidates]
    listed: list[dict[int, Any]] = [
        {i: [{"caption": text} for text in texts] for i, texts in enumerate(each)}
        for each in (references, [[text] for text in candidates])
    ]
    _, expected = Cider().compute_score(*(PTBTokenizer().tokenize(each) for each in listed))
    assert cider(candidates, references, "ptb").tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert expected.max() > 1


# ---------------------------------------------------------------------------------------------- models

WORDS = ["cat", "dog", "blue bird", "ant"]
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (20, 20, 20)]


def coloured_set(folder: Path) -> EvalSet:
    """Images of one colour each, whose captions tell the colour; the second caption of each is another text."""
    samples = [
        {
            "png": encode(np.full((32, 32, 3), COLOURS[i % 4], np.uint8), "PNG"),
            "json": {"captions": ["something else altogether", WORDS[i % 4].upper()]},
        }
        for i in range(10)
    ]
    return EvalSet("val", Shards(write_tars(folder, samples, [10])), Preprocess(32), caption="json.captions")


@cache
def _trained() -> tuple[ImageTextModel, Captioning]:
    torch.manual_seed(0)
    model = ImageTextModel(tiny.vit(), tiny.text(vocab_size=TOKENIZER.vocab_size), embed_dim=12)
    captioning = Captioning(model, decoder_depth=1, decoder_heads=2, num_queries=0)
    images = torch.tensor(COLOURS, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)
    text, lengths = TOKENIZER(WORDS)
    batch = Batch({"pairs": Samples(torch.arange(4), torch.arange(4), torch.arange(4), images, text, lengths)})
    optimizer = torch.optim.Adam([*model.parameters(), *captioning.parameters()], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss, sums = captioning.loss(Encodings(model, batch))
        loss.backward()
        optimizer.step()
    assert sums["accuracy"] == captioning.count(batch)
    return model, captioning


def trained() -> tuple[ImageTextModel, Captioning]:
    """A captioner that has learned the colours' words by heart."""
    return copy.deepcopy(_trained())


def captioned(context: Context, **options: Any) -> tuple[dict[str, Score], dict[str, np.ndarray]]:
    scores = evaluate({"captions": Captions(**options)}, context)
    return {name.removeprefix("eval-val/"): score for name, score in scores.items()}, context.shown.pictures


def test_without_the_package_or_java_the_evaluator_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, captioning = trained()
    captioner, other = (
        make_context(model, coloured_set(tmp_path), build_objectives=lambda each=each: {"own": each})
        for each in (captioning, InfoNCE(model))
    )
    monkeypatch.setenv("PATH", "")
    assert Captions().applicable_datasets(captioner) == ["val"]
    with pytest.raises(UsageError, match="there is no java on PATH; expected one, or words"):
        Captions(tokenization="ptb").applicable_datasets(captioner)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider", None)
    with pytest.raises(UsageError, match=r"pip install 'multimodal-pretrain\[captions\]'"):
        Captions().applicable_datasets(captioner)
    assert Captions().applicable_datasets(other) == [], "eval=all needs no package for a run that writes no captions"


def test_a_captioner_that_learned_its_captions_matches_them_and_a_collapsed_one_does_not(tmp_path: Path) -> None:
    model, captioning = trained()
    data = coloured_set(tmp_path)
    context = make_context(model, data, build_objectives=lambda: {"infonce": InfoNCE(model), "captioning": captioning})
    captioning.train()
    scores, shown = captioned(context, batch_size=3)
    assert captioning.training
    assert scores["caption_exact_match"] == 1  # any caption of an image counts, whatever its case
    assert scores["caption_exact_match"].intervals["sample"] == (1, 1)
    assert 1 < scores["cider"] < 10 and set(scores["cider"].intervals) == {"sample"}
    assert shown["eval-val/captions"].shape == (8 * 160, 160 + 460, 3)
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter.zero_()  # all images look alike
    collapsed, _ = captioned(context)
    assert collapsed["caption_exact_match"] <= 0.3 and collapsed["cider"] < scores["cider"] / 2


def test_generation_ends_once_every_caption_has_its_end_and_gives_the_same_tokens() -> None:
    model, captioning = trained()
    images = torch.tensor(COLOURS, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)
    start = torch.full((4, 1), int(TOKENIZER(["a"])[0][0, 0]))
    rows = torch.arange(4)
    encodings = Encodings(model, Batch({"pairs": Samples(rows, rows, rows, images, start, torch.ones(4).long())}))
    with torch.no_grad():
        short, long = captioning.generate(encodings, 20, TOKENIZER.end_id), captioning.generate(encodings, 20)
    assert short.shape[1] == 4 and long.shape[1] == 20  # start, blue, bird, end
    assert torch.equal(short, long[:, :4])


def test_a_run_without_captioning_or_a_start_token_is_told_so(tmp_path: Path) -> None:
    model = make_context().model
    data = make_set(tmp_path)
    assert Captions().applicable_datasets(make_context(model, data)) == []
    context = make_context(model, data, build_objectives=lambda: {"infonce": InfoNCE(model)})
    with pytest.raises(
        UsageError, match="objective is 'infonce'; expected one that generates captions: the run has none"
    ):
        captioned(context, objective="infonce")

    class Headless(ClipTokenizer):
        """Leaves out the start token."""

        def __call__(self, texts: Any) -> tuple[Tensor, Tensor]:
            ids, lengths = super().__call__(texts)
            return ids[:, 1:], lengths - 1

    captioning = Captioning(model, 1, 2, 0)
    headless = Context(model, Headless(16), {"val": data}, None, 4, 0, build_objectives=lambda: {"c": captioning})
    with pytest.raises(UsageError, match="begins texts with their first word"):
        captioned(headless)


def caption_untrained(folder: Path) -> tuple[dict[str, Score], str]:
    """Return (scores, hash of the picture) of an untrained captioner on this rank; no picture: empty."""
    torch.manual_seed(0)
    model = make_context().model
    captioning = tiny.randomize(Captioning(model, 1, 2, 0))
    context = make_context(model, make_set(folder), build_objectives=lambda: {"captioning": captioning})
    scores, shown = captioned(context, longest=5, batch_size=3)
    return scores, "".join(hashlib.sha256(each.tobytes()).hexdigest() for each in shown.values())
