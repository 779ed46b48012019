"""The held-out contrastive loss in fixed batches."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mmpretrain.evals.contrastive_loss import ContrastiveLoss
from tests.evals.held_out import embedded, make_context, make_set


def test_loss_is_the_mean_of_open_clips_over_full_batches() -> None:
    images, texts = F.normalize(torch.randn(11, 6), dim=-1), F.normalize(torch.randn(11, 6), dim=-1)
    context = make_context(_embedded={"val": embedded(images, texts, [(i, i) for i in range(11)])})
    scale = torch.tensor(10.0)
    batches = [ClipLoss()(images[start : start + 4], texts[start : start + 4], scale) for start in (0, 4)]
    expected = float(sum(batches) / 2)
    assert ContrastiveLoss(batch_size=4)("val", context) == {"contrastive_loss": pytest.approx(expected, rel=1e-5)}


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    images, texts = F.normalize(torch.randn(5, 6), dim=-1), F.normalize(torch.randn(5, 6), dim=-1)
    context = make_context(_embedded={"val": embedded(images, texts, [(i, i) for i in range(5)])})
    expected = float(ClipLoss()(images, texts, torch.tensor(10.0)))
    assert ContrastiveLoss(batch_size=8)("val", context)["contrastive_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_image_with_many_captions_stands_with_its_first() -> None:
    images, texts = F.normalize(torch.randn(3, 6), dim=-1), F.normalize(torch.randn(5, 6), dim=-1)
    pairs = [(0, 4), (0, 1), (1, 1), (1, 0), (1, 4), (2, 3), (2, 2)]
    context = make_context(_embedded={"val": embedded(images, texts, pairs)})
    expected = float(ClipLoss()(images, texts[[4, 1, 3]], torch.tensor(10.0)))
    assert ContrastiveLoss()("val", context)["contrastive_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_is_run_on_sets_with_captions_where_the_run_has_a_logit_scale(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    assert ContrastiveLoss().applicable_datasets(make_context(data=data)) == ["val"]
    assert ContrastiveLoss().applicable_datasets(make_context(data=data, logit_scale=None)) == []
    assert ContrastiveLoss().applicable_datasets(make_context(data=make_set(tmp_path, caption=None))) == []
