"""Augmentations: functions of the sample's seed alone, whichever library draws."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from mmpretrain.data.augment import Augmentation, TimmAugment, augmented
from tests.tars import smooth_pixels


def image(seed: int = 0) -> Tensor:
    return torch.from_numpy(smooth_pixels(24, 24, seed).copy()).permute(2, 0, 1)


AUGMENTATIONS: dict[str, list[Augmentation]] = {
    "torchvision": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)],
    "randaugment": [TimmAugment("rand-m9-mstd0.5-inc1")],
    "augmix": [TimmAugment("augmix-m3-w3")],
    "autoaugment": [TimmAugment("original")],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    results = []
    for disturbance in range(2):
        random.seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        torch.manual_seed(disturbance)
        results.append([augmented(image(), AUGMENTATIONS[name], seed) for seed in range(8)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(each.shape == (3, 24, 24) and each.dtype == torch.uint8 for each in results[0])
    assert len({each.numpy().tobytes() for each in results[0]}) > 4, "seeds make no difference"


def test_without_augmentation_the_image_is_itself_and_no_generator_moves() -> None:
    original = image()
    state = torch.get_rng_state()
    assert augmented(original, (), 3) is original
    augmented(original, AUGMENTATIONS["torchvision"], 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("augmentation", "became"),
    [
        (v2.ToDtype(torch.float32, scale=True), r"float32 \[3, 24, 24\]"),
        (v2.Grayscale(), r"uint8 \[1, 24, 24\]"),  # would be broadcast to three equal channels
        (v2.CenterCrop(12), r"uint8 \[3, 12, 12\]"),
        (v2.ToPILImage(), "<class 'PIL.Image.Image'>"),
    ],
)
def test_an_augmentation_that_leaves_another_type_or_shape_is_refused(augmentation: Augmentation, became: str) -> None:
    turned = f"{type(augmentation).__name__} turned an image uint8 \\[3, 24, 24\\] into {became}; an augmentation keeps"
    with pytest.raises(ValueError, match=f"^{turned}"):
        augmented(image(), [augmentation], 3)


def test_a_type_that_comes_back_at_the_end_is_taken() -> None:
    there_and_back = [v2.ToDtype(torch.float32, scale=True), v2.ToDtype(torch.uint8, scale=True)]
    assert torch.equal(augmented(image(), there_and_back, 3), image())


@pytest.mark.parametrize("policy", ["nonsense", "rand-nope5"])
def test_a_policy_that_timm_does_not_know_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy is '{policy}'; expected one of timm's"):
        TimmAugment(policy)
