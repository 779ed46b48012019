"""Attacks: their formulas, their gradient by autograd, and what they do to a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.errors import UsageError
from mmpretrain.evals.adversarial import Adversarial, fgsm, loss_ascent, pgd
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.zero_shot import class_embeddings
from tests.evals.test_robustness import CLASSES, context


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_the_ascent_is_along_the_gradient_of_cross_entropy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = (F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1) for n in (8, 5))
    labels = torch.randint(0, 5, (8,), generator=generator)
    rows.requires_grad_()
    loss = F.cross_entropy(scale * rows @ weights.T, labels, reduction="sum")
    expected = torch.autograd.grad(loss, rows)[0]
    found = loss_ascent(rows.detach(), labels, weights, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.abs().amax(1), torch.ones(8))
    torch.testing.assert_close(F.cosine_similarity(found.double(), expected), torch.ones(8).double(), rtol=1e-6, atol=0)


def test_the_gradient_of_a_sure_prediction_does_not_vanish() -> None:
    found = loss_ascent(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.eye(2), 500.0)
    torch.testing.assert_close(
        found, torch.tensor([[-1.0, 1.0]])
    )  # e^-500 of it is left in float64, and nothing in float32


def test_attacks_stay_in_the_radius_and_among_pixels() -> None:
    images = torch.tensor([0.0, 1.0, 100.0, 252.0, 255.0]).expand(2, 1, 1, 5)
    direction = torch.tensor([[-1.0], [1.0]])[..., None, None] * torch.tensor([1.0, 2.0, -3.0, 1e-9, 0.5])

    def gradient(pixels: Tensor) -> Tensor:
        return direction

    changed = fgsm(images, gradient, 4)
    assert changed[1, 0, 0].tolist() == [4, 5, 96, 255, 255] and changed[0, 0, 0].tolist() == [0, 0, 104, 248, 251]
    start = torch.full_like(images, 3.0)
    far = pgd(images, gradient, 4, steps=50, step_size=1, start=start)
    torch.testing.assert_close(far, changed)
    one = pgd(images, gradient, 4, steps=1, step_size=0.5, start=start)
    assert one[1, 0, 0].tolist() == [3.5, 4.5, 102.5, 255, 255]


def test_pgd_follows_the_gradient_where_it_is() -> None:
    """Ascend -(x - 103)^2 from 100: the maximum is inside the radius, and one long step would pass it."""
    images = torch.full((1, 1, 1, 1), 100.0)
    found = pgd(images, lambda x: -2 * (x - 103), 10, 40, 0.5, torch.zeros_like(images))
    assert abs(float(found) - 103) <= 0.5


def test_larger_radii_and_more_steps_leave_fewer_images(tmp_path: Path) -> None:
    found = context(tmp_path)  # the model's own predictions are the labels
    scores = evaluate({"adversarial": Adversarial(radii=(0.01, 2, 16), steps=4)}, found)
    assert scores["eval-val/unattacked_acc1"] == 1 == scores["eval-val/fgsm_acc1@0.01"]
    for attack in ("fgsm", "pgd"):
        assert 1 > scores[f"eval-val/{attack}_acc1@2"] > scores[f"eval-val/{attack}_acc1@16"]
    assert scores["eval-val/pgd_acc1@16"] <= scores["eval-val/fgsm_acc1@16"]
    assert all(parameter.grad is None for parameter in found.model.parameters())
    assert evaluate({"adversarial": Adversarial(radii=(0.01, 2, 16), steps=4)}, context(tmp_path, 7, 2)) == scores


def test_the_scores_are_those_of_autograd_through_the_whole_model(tmp_path: Path) -> None:
    found = context(tmp_path)
    scores = evaluate({"adversarial": Adversarial(radii=(3,), attacks=("fgsm",))}, found)
    model, weights, labels = found.model, class_embeddings(CLASSES, found), found.embedded("val").labels
    hits = []
    for row in range(len(labels)):
        pixels = found.image("val", row)[None].float().requires_grad_()
        rows = model.project_image(model.image_encoder(model.normalize(pixels)).pooled)
        F.cross_entropy(found.logit_scale * rows @ weights.T, labels[row][None]).backward()
        assert pixels.grad is not None
        changed = (pixels + 3 * pixels.grad.sign()).clamp(0, 255)
        rows = model.project_image(model.image_encoder(model.normalize(changed)).pooled)
        hits.append(bool((rows @ weights.T).argmax() == labels[row]))
    assert 0 < sum(hits) < len(hits)
    assert scores["eval-val/fgsm_acc1@3"] == pytest.approx(sum(hits) / len(hits))


def test_bf16_attacks_work_too(tmp_path: Path) -> None:
    found = replace(context(tmp_path), autocast=torch.autocast("cpu", torch.bfloat16))
    scores = evaluate({"adversarial": Adversarial(radii=(16,), steps=3)}, found)
    assert scores["eval-val/pgd_acc1@16"] < scores["eval-val/unattacked_acc1"]


def test_a_collapsed_model_has_no_hit(tmp_path: Path) -> None:
    found = context(tmp_path)
    constant = replace(found._embedded["val"], images=torch.zeros_like(found._embedded["val"].images))
    scores = evaluate({"adversarial": Adversarial()}, replace(found, _embedded={"val": constant}))
    assert set(scores.values()) == {0} and len(scores) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radii": []}, r"^radii is \[\]; expected at least one"),
        ({"radii": [0]}, r"^radii is 0; expected a number above 0 and at most 255"),
        ({"attacks": ["cw"]}, r"^attacks is \['cw'\]; expected fgsm, pgd or both"),
        ({"steps": 0}, r"^steps is 0; expected a number at least 1"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Adversarial(**arguments)  # type: ignore[arg-type]
