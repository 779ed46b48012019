"""The two contrastive objectives: where they start, what they hand out, and their bounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from mmpretrain.objectives.base import IndependentObjective
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.objectives.simclr import BatchStandardization
from mmpretrain.training.task import Encodings
from tests import tiny


def test_temperatures_and_biases_start_where_the_papers_start_them() -> None:
    model = tiny.image_text()
    infonce, sigmoid = InfoNCE(model), Sigmoid(model)
    assert infonce.logit_scale.shape == sigmoid.logit_scale.shape == sigmoid.logit_bias.shape == (1,)
    assert infonce.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert sigmoid.logit_scale.exp().item() == pytest.approx(10)
    assert sigmoid.logit_bias.item() == -10


def test_objectives_own_their_scalars_and_nothing_of_the_model() -> None:
    model = tiny.image_text()
    assert [name for name, _ in InfoNCE(model).named_parameters()] == ["logit_scale"]
    assert [name for name, _ in Sigmoid(model).named_parameters()] == ["logit_scale", "logit_bias"]


def test_losses_of_a_batch_are_open_clips() -> None:
    model = tiny.image_text().double()
    batch = tiny.batch([3, 5, 9, 9, 20])
    samples = batch.streams["pairs"]
    assert samples.images is not None and samples.text is not None and samples.lengths is not None
    image = F.normalize(model.image_projection(model.image.trunk(model.normalize(samples.images))), dim=-1)
    pooled = model.encode_text(samples.text, samples.lengths).pooled
    text = F.normalize(model.text_projection(pooled), dim=-1)

    infonce = InfoNCE(model, init_logit_scale=20).double()
    expected = ClipLoss()(image, text, infonce.logit_scale.exp())
    torch.testing.assert_close(infonce.loss(*infonce.embed(Encodings(model, batch))), expected, rtol=1e-10, atol=0)
    sigmoid = Sigmoid(model, init_logit_scale=20, init_logit_bias=-5).double()
    expected = SigLipLoss()(image, text, sigmoid.logit_scale.exp(), sigmoid.logit_bias)
    loss = sigmoid.loss(*sigmoid.embed(Encodings(model, batch)))
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-10, atol=0)


def test_copies_in_a_batch_are_no_negatives_of_each_other() -> None:
    model = tiny.image_text().double()
    for objective in (InfoNCE(model).double(), Sigmoid(model).double()):
        rows, shared = objective.embed(Encodings(model, tiny.batch([3, 5, 9])))
        copies = {**rows, "ids": torch.tensor([7, 7, 8])}
        assert objective.loss(copies, shared) < objective.loss(rows, shared)


def test_coupled_objectives_are_not_taken_for_independent_ones() -> None:
    model = tiny.image_text()
    assert not isinstance(InfoNCE(model), IndependentObjective)
    assert not isinstance(Sigmoid(model), IndependentObjective)


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


def test_simclrs_normalisation_is_batch_norm() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ours = BatchStandardization(5).double()
    theirs = torch.nn.BatchNorm1d(5, track_running_stats=False).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(5))
        ours.bias.copy_(torch.randn(5))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    weights = torch.randn(7, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((module(x) * weights).sum(), x)[0] for module in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(ours(x[:1]), ours.bias[None])
