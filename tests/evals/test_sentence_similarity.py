"""Similarity of sentences: correlations against SciPy, constant models, and fields that are wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from mmpretrain.data.shards import Shards
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.embeddings import EvalSet, embed_texts
from mmpretrain.evals.sentence_similarity import SentenceSimilarity, _Ranked, pearson
from mmpretrain.models.image_text import ImageTextModel
from tests import tiny
from tests.evals.held_out import TOKENIZER, make_context, make_model, make_set
from tests.tars import write_tars

WORDS = ["cat", "dog", "house", "tree", "red", "blue", "runs", "sleeps"]


def pairs() -> list[dict[str, Any]]:
    """Pairs of sentences, some twice; the scores have ties, and some are texts."""
    rng = np.random.default_rng(0)
    result = []
    for number in range(40):
        first, second = (" ".join(rng.choice(WORDS, 3)) for _ in range(2))
        score = float(rng.integers(0, 6))
        fields = {"first": first, "second": second if number % 5 else f" {first}\n", "score": score}
        result.append({"json": fields | ({"score": str(score)} if number % 2 else {})})
    return [*result, *result[:4]]


def sts_set(folder: Path) -> EvalSet:
    fields = {"sentence2": "json.second", "similarity": "json.score"}
    samples = pairs()
    return EvalSet(
        "val", Shards(write_tars(folder, samples, [len(samples)])), None, caption="json.first", fields=fields
    )


def cosines(model: ImageTextModel, samples: list[dict[str, Any]]) -> Any:
    rows = [
        embed_texts(model, TOKENIZER, [each["json"][name].strip() for each in samples], 4)
        for name in ("first", "second")
    ]
    return F.cosine_similarity(rows[0].double(), rows[1].double()).numpy()


def text_model() -> ImageTextModel:
    torch.manual_seed(0)
    return tiny.randomize(ImageTextModel(None, tiny.text(vocab_size=TOKENIZER.vocab_size)))


@pytest.mark.parametrize("make", [make_model, text_model])
@torch.no_grad()
def test_correlations_are_scipys(tmp_path: Path, make: Any) -> None:
    model, samples = make(), pairs()
    scores = evaluate({"sts": SentenceSimilarity()}, make_context(model, sts_set(tmp_path)))
    expected, gold = cosines(model, samples), [float(each["json"]["score"]) for each in samples]
    assert scores["eval-val/sts_pearson"] == pytest.approx(stats.pearsonr(expected, gold).statistic, abs=1e-4)
    # In SciPy's, the last bits of equal pairs differ and would order them.
    ranked = stats.spearmanr(expected.round(5), gold).statistic
    assert scores["eval-val/sts_spearman"] == pytest.approx(ranked, abs=1e-9)
    for score in scores.values():
        low, high = score.intervals["sample"]
        assert -1 <= low < score < high <= 1


@pytest.mark.parametrize("seed", range(5))
def test_correlations_with_ties_and_repetitions_are_scipys_in_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 7, 50) / 3, rng.normal(size=50).round(1)
    drawn = rng.integers(50, size=50)
    for rows in (np.arange(50), drawn):
        ranks = [_Ranked(torch.from_numpy(each)).ranks(torch.from_numpy(rows)) for each in (x, y)]
        assert np.array_equal(ranks[0].numpy(), stats.rankdata(x[rows]))
        assert pearson(*ranks) == pytest.approx(stats.spearmanr(x[rows], y[rows]).statistic, abs=1e-12)
        ours = pearson(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
        assert ours == pytest.approx(stats.pearsonr(x[rows], y[rows]).statistic, abs=1e-12)


def test_a_constant_or_nan_has_no_correlation() -> None:
    y = torch.arange(5.0, dtype=torch.float64)
    for x in (torch.full_like(y, 0.1), y.clone().fill_(torch.nan), torch.tensor([0.0, 1.0, torch.nan, 3.0, 4.0])):
        assert pearson(x.double(), y) == pearson(y, x.double()) == 0
        assert pearson(_Ranked(x.double()).ranks(torch.arange(5)), y) == 0


@pytest.mark.parametrize("bias", [0.0, 1.0, float("nan")])
def test_a_collapsed_model_scores_zero(tmp_path: Path, bias: float) -> None:
    """One whose embeddings are 0, those of a unit vector, or no numbers."""
    model = make_model()
    assert model.text is not None
    for name, parameter in model.text.named_parameters():
        nn.init.constant_(parameter, bias if name.endswith("bias") else 0.0)
    scores = evaluate({"sts": SentenceSimilarity()}, make_context(model, sts_set(tmp_path)))
    assert scores == {"eval-val/sts_spearman": 0.0, "eval-val/sts_pearson": 0.0}


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("sentence2", ["a", 3], r"data.val.val.fields.sentence2: 3; expected a sentence"),
        ("sentence2", ["a", " "], r"data.val.val.fields.sentence2: ' '; expected a sentence"),
        ("similarity", [1, "high"], r"data.val.val.fields.similarity: 'high'; expected a number"),
        ("similarity", [1, None], r"data.val.val.fields.similarity: None; expected a number"),
        ("similarity", [1, float("nan")], r"data.val.val.fields.similarity: nan; expected a number"),
        ("similarity", [2.5], r"data.val.val.fields.similarity is 2.5 of each sample; expected different scores"),
    ],
)
def test_fields_of_another_form_are_one_line(tmp_path: Path, field: str, values: list[Any], message: str) -> None:
    context = make_context(data=sts_set(tmp_path))
    found = context.embedded("val")
    repeated = [values[i % len(values)] for i in range(len(pairs()))]
    context._embedded["val"] = replace(found, fields={**found.fields, field: repeated})
    with pytest.raises(UsageError, match=message):
        evaluate({"sts": SentenceSimilarity()}, context)


def test_it_needs_texts_and_both_fields(tmp_path: Path) -> None:
    data = sts_set(tmp_path)
    for lacking in ({"caption": None}, {"fields": {"sentence2": "json.second"}}):
        assert SentenceSimilarity().applicable_datasets(make_context(data=replace(data, **lacking))) == []
    images = make_set(tmp_path, fields={"sentence2": "json.label", "similarity": "json.number"})
    assert SentenceSimilarity().applicable_datasets(make_context(data=images)) == ["val"]
