"""Alignment, uniformity, modality gap and effective rank, by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmpretrain.errors import UsageError
from mmpretrain.evals import geometry
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.geometry import Geometry, rank_me, uniformity
from tests.evals.held_out import embedded, make_context, make_set


def test_uniformity_is_over_all_pairs_of_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = F.normalize(torch.randn(13, 5), dim=1)
    pairs = [
        np.exp(-2 * float((rows[i] - rows[j]).double().square().sum())) for i in range(13) for j in range(13) if i != j
    ]
    assert uniformity(rows) == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)
    monkeypatch.setattr(geometry, "_CHUNK", 4)
    assert uniformity(rows) == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)
    assert uniformity(rows[:1].expand(5, 5)) == pytest.approx(0, abs=1e-6)


def test_rank_me_counts_directions() -> None:
    assert rank_me(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert rank_me(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)
    p = np.array([0.7, 0.2, 0.1])
    expected = np.exp(-(p * np.log(p)).sum())
    assert rank_me(torch.diag(torch.tensor([7.0, 2.0, 1.0]))) == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(rank_me(torch.zeros(3, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_has_no_geometry(tmp_path: Path, value: float) -> None:
    data = embedded(torch.full((6, 4), value), torch.full((2, 4), value), [(i, i % 2) for i in range(6)])
    scores = evaluate({"geometry": Geometry()}, make_context(data=make_set(tmp_path), _embedded={"val": data}))
    assert len(scores) == 7 and all(np.isnan(score) for score in scores.values())


def test_scores_are_of_images_and_their_first_captions(tmp_path: Path) -> None:
    images, texts = F.normalize(torch.randn(6, 4), dim=1), F.normalize(torch.randn(7, 4), dim=1)
    pairs = [(0, 2), (0, 1), (1, 1), (2, 0), (3, 3), (4, 5), (5, 6)]
    context = make_context(data=make_set(tmp_path), _embedded={"val": embedded(images, texts, pairs)})
    scores = evaluate({"geometry": Geometry()}, context)
    first = texts[[2, 1, 0, 3, 5, 6]]
    assert scores["eval-val/alignment"] == pytest.approx(float((images - first).square().sum(1).mean()), rel=1e-5)
    assert scores["eval-val/modality_gap"] == pytest.approx(float((images.mean(0) - first.mean(0)).norm()), rel=1e-5)
    assert scores["eval-val/text_uniformity"] == pytest.approx(uniformity(first))
    assert scores["eval-val/image_rankme"] == pytest.approx(rank_me(images))
    assert set(scores["eval-val/alignment"].intervals) == {"sample"}
    labelled = replace(context._embedded["val"], labels=torch.arange(6) % 2)
    scores = evaluate({"geometry": Geometry()}, replace(context, _embedded={"val": labelled}))
    assert set(scores["eval-val/alignment"].intervals) == {"sample", "class"}
    few = evaluate({"geometry": Geometry(max_samples=2)}, context)  # the first and the last one
    assert few["eval-val/alignment"] == pytest.approx(float((images - first)[[0, 5]].square().sum(1).mean()), rel=1e-5)


def test_a_collapsed_model_has_rank_one_and_no_uniformity(tmp_path: Path) -> None:
    data = embedded(torch.ones(6, 4), torch.ones(2, 4), [(i, i % 2) for i in range(6)])
    scores = evaluate({"geometry": Geometry()}, make_context(data=make_set(tmp_path), _embedded={"val": data}))
    assert scores["eval-val/image_uniformity"] == pytest.approx(0, abs=1e-5)
    assert scores["eval-val/image_rankme"] == pytest.approx(1, abs=1e-4)
    assert scores["eval-val/alignment"] == scores["eval-val/modality_gap"] == pytest.approx(0, abs=1e-6)


def test_a_single_readable_image_is_one_line(tmp_path: Path) -> None:
    data = embedded(torch.ones(1, 4), torch.ones(1, 4), [(0, 0)])
    with pytest.raises(
        UsageError, match=r"^data.val.val has 1 image that can be read, of 1; expected two or more: .*$"
    ):
        evaluate({"geometry": Geometry()}, make_context(data=make_set(tmp_path), _embedded={"val": data}))
