"""Calibration of zero-shot probabilities: by hand, and by scipy's minimum."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

from mmpretrain.data.classes import Classes
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.calibration import Calibration, best_temperature, calibration_error, error_score
from mmpretrain.evals.zero_shot import class_embeddings
from tests.evals.held_out import LABELS, embedded, make_context, make_set

CLASSES = Classes(LABELS, [[f"a {name}", f"the {name}"] for name in LABELS])


def test_the_error_is_the_weighted_gap_of_accuracy_and_confidence() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.4, 0.6], [0.2, 0.8], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    # Bins of width .25: (.25, .5] has .5 (wrong), (.5, .75] has .6 (right), (.75, 1] has .9 (right), .85 (wrong), .8 (right).
    expected = (abs(0 - 0.5) + abs(1 - 0.6) + abs(2 - 2.55)) / 5
    assert calibration_error(probabilities, labels, 4) == pytest.approx(expected)
    assert calibration_error(torch.eye(3), torch.arange(3), 15) == 0


def test_a_tie_is_no_hit() -> None:
    assert calibration_error(torch.full((6, 3), 1 / 3), torch.arange(6) % 3, 15) == pytest.approx(1 / 3)


@pytest.mark.parametrize("sharpened", [1.0, 2.0])
def test_an_interval_has_the_error_and_corrects_the_bias_of_resamples(sharpened: float) -> None:
    errors, lows = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(1000, 10, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        confidence, predicted = (sharpened * logits).softmax(1).max(1)
        score = error_score(confidence, (predicted == labels).double(), 15)
        low, high = score.intervals["sample"]
        assert 0 <= low <= score <= high <= 1
        errors.append(float(score))
        lows.append(low)
    if sharpened == 1:  # the true error is 0
        assert np.mean(errors) > 0.03 and np.mean(lows) < 0.01
    else:
        assert np.mean(lows) > 0.1


def test_the_temperature_minimises_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator)[:, 0]

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / np.exp(log_t), labels))

    expected = np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert best_temperature(logits, labels) == pytest.approx(expected, rel=1e-4)


def context(folder: Path, logit_scale: float | None) -> Context:
    data = make_set(folder, label="cls", classes=CLASSES)
    found = make_context(data=data, logit_scale=logit_scale)
    texts = class_embeddings(CLASSES, found)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (400,), generator=generator)
    images = texts[labels] + torch.randn(400, texts.shape[1], generator=generator) * texts.std() * 2
    rows = replace(embedded(images, torch.zeros(0, texts.shape[1]), []), labels=labels)
    return replace(found, _embedded={"val": rows})


def test_one_temperature_mends_probabilities_that_are_too_sure(tmp_path: Path) -> None:
    scores = evaluate({"calibration": Calibration()}, context(tmp_path, 500.0))
    assert scores["eval-val/ece"] > 0.1 > scores["eval-val/ece_scaled"]
    assert scores["eval-val/nll"] > scores["eval-val/nll_scaled"]
    assert scores["eval-val/temperature"] > 2
    low, high = scores["eval-val/ece"].intervals["sample"]
    assert low < scores["eval-val/ece"] < high


def test_a_collapsed_model_has_the_loss_of_chance(tmp_path: Path) -> None:
    found = context(tmp_path, 100.0)
    constant = replace(found._embedded["val"], images=torch.zeros_like(found._embedded["val"].images))
    scores = evaluate({"calibration": Calibration()}, replace(found, _embedded={"val": constant}))
    assert scores["eval-val/nll"] == pytest.approx(np.log(3)) == scores["eval-val/nll_scaled"]
    assert scores["eval-val/ece"] == pytest.approx(1 / 3)  # its probability of each class, which all tie


def test_a_single_readable_image_is_one_line(tmp_path: Path) -> None:
    found = context(tmp_path, 100.0)
    rows = found._embedded["val"]
    alone = replace(rows, images=rows.images[:1], labels=rows.labels[:1])
    with pytest.raises(
        UsageError, match=r"^data.val.val has 1 image that can be read, of 1; expected two or more: .*$"
    ):
        evaluate({"calibration": Calibration()}, replace(found, _embedded={"val": alone}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_has_no_temperature(tmp_path: Path, value: float) -> None:
    found = context(tmp_path, 100.0)
    diverged = replace(found._embedded["val"], images=torch.full_like(found._embedded["val"].images, value))
    scores = evaluate({"calibration": Calibration()}, replace(found, _embedded={"val": diverged}))
    assert len(scores) == 5 and all(np.isnan(score) for score in scores.values())


def test_a_run_without_logit_scale_has_no_probabilities(tmp_path: Path) -> None:
    assert Calibration().applicable_datasets(context(tmp_path, None)) == []
    assert Calibration().applicable_datasets(context(tmp_path, 1.0)) == ["val"]
