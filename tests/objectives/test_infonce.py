"""InfoNCE: CLIP's loss of a batch, its learned temperature, and the objective's other positives."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mmpretrain.losses import multi_positive_info_nce
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.base import IndependentObjective
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.schedules import Clock, TrainingProgress
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.references import embeddings


def test_loss_of_a_batch_is_open_clips() -> None:
    model = tiny.image_text().double()
    batch = tiny.batch([3, 5, 9, 9, 20])
    infonce = InfoNCE(model, init_logit_scale=20).double()
    expected = ClipLoss()(*embeddings(model, batch), infonce.logit_scale.exp())
    torch.testing.assert_close(infonce.loss(*infonce.embed(Encodings(model, batch))), expected, rtol=1e-10, atol=0)


def test_the_temperature_starts_where_the_paper_starts_it_and_is_all_that_the_objective_owns() -> None:
    infonce = InfoNCE(tiny.image_text())
    assert [(name, parameter.shape) for name, parameter in infonce.named_parameters()] == [("logit_scale", (1,))]
    assert infonce.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not isinstance(infonce, IndependentObjective)


def test_copies_in_a_batch_are_no_negatives_of_each_other() -> None:
    model = tiny.image_text().double()
    infonce = InfoNCE(model).double()
    rows, shared = infonce.embed(Encodings(model, tiny.batch([3, 5, 9])))
    copies = {**rows, "ids": torch.tensor([7, 7, 8])}
    assert infonce.loss(copies, shared) < infonce.loss(rows, shared)


def test_logit_scale_is_brought_back_into_its_bounds_after_a_step_and_not_before() -> None:
    model, batch = tiny.image_text(), tiny.batch([3, 5])
    objective = InfoNCE(model, max_logit_scale=50)
    with torch.no_grad():
        objective.logit_scale.fill_(math.log(70))
    _, shared = objective.embed(Encodings(model, batch))
    assert shared["logit_scale"].item() == pytest.approx(70)
    (gradient,) = torch.autograd.grad(shared["logit_scale"], objective.logit_scale)
    assert gradient.item() == pytest.approx(70)
    objective.after_step(model, batch.progress, torch.zeros(()))
    assert objective.logit_scale.exp().item() == pytest.approx(50)
    with torch.no_grad():
        objective.logit_scale.fill_(-1)
    objective.after_step(model, batch.progress, torch.zeros(()))
    assert objective.logit_scale.exp().item() == 1


def test_all_texts_of_a_group_are_positives_where_groups_are_asked_for() -> None:
    model = tiny.image_text().double()
    infonce = InfoNCE(model, positives="group").double()
    batch = tiny.batch([3, 5, 9])
    groups = torch.tensor([4, 4, 6])
    grouped = replace(batch, streams={"pairs": replace(batch.streams["pairs"], groups=groups)})
    loss = infonce.loss(*infonce.embed(Encodings(model, grouped)))
    image, text = embeddings(model, batch)
    logits = infonce.logit_scale.exp() * image @ text.T
    targets = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, multi_positive_info_nce(image, text, infonce.logit_scale.exp(), groups))
    with pytest.raises(
        ValueError, match=r"^objective\.infonce\.positives is 'group', but data\.train\.pairs\.group is null"
    ):
        infonce.embed(Encodings(model, batch))


def test_patches_are_dropped_as_the_schedule_has_it_and_none_at_ratio_0() -> None:
    model, batch = tiny.image_text(), tiny.batch([3, 5])
    infonce = InfoNCE(model, mask_ratio={"piecewise": {"0%": 0.5, "50%": 0}})
    first, last = (infonce.patches(TrainingProgress(samples, Clock(10, 100, 1000))) for samples in (0, 500))
    assert first is not None and first.ratio == (0.5, 0.5) and last is None
    whole, part = (Encodings(model, batch).image_embedding("pairs", spec) for spec in (last, first))
    assert not torch.allclose(whole, part)
    torch.testing.assert_close(whole, embeddings(model, batch)[0])


def test_arguments_out_of_range_are_refused_in_one_line() -> None:
    model = tiny.image_text()
    with pytest.raises(ValueError, match=r"^objective\.infonce\.max_logit_scale is 1; expected a number above 1"):
        InfoNCE(model, max_logit_scale=1)
    with pytest.raises(
        ValueError, match=r"^objective\.infonce\.init_logit_scale is 200; .* at least 1 and at most 100"
    ):
        InfoNCE(model, init_logit_scale=200)
    with pytest.raises(ValueError, match=r"^objective\.infonce\.mask_ratio is 1\.0; expected a number .* below 1"):
        InfoNCE(model, mask_ratio=1.0)
    convolutional = ImageTextModel(TimmEncoder("test_resnet", 32), tiny.text(), embed_dim=12)
    with pytest.raises(
        ValueError, match=r"^objective\.infonce\.mask_ratio is 0\.5, but model\.image cannot drop patches"
    ):
        InfoNCE(convolutional, mask_ratio=0.5)
