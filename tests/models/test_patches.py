"""Patches and their reconstruction against plain loops."""

import math

import numpy as np
import pytest
import torch

from mmpretrain.models.patches import masked_reconstruction, patchify


def test_patchify_cuts_images_as_a_loop_does() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, (4, 2))
    assert patches.shape == (2, 2 * 6, 4 * 2 * 3)
    for sample in range(2):
        for row in range(2):
            for column in range(6):
                values = [
                    images[sample, channel, row * 4 + y, column * 2 + x].item()
                    for y in range(4)
                    for x in range(2)
                    for channel in range(3)
                ]
                assert patches[sample, row * 6 + column].tolist() == values


def test_patchify_leaves_out_a_border_that_fills_no_patch() -> None:
    images = torch.randn(2, 3, 11, 9)
    assert torch.equal(patchify(images, (4, 4)), patchify(images[:, :, :8, :8], (4, 4)))


def reconstruction_by_loop(prediction: np.ndarray, patches: np.ndarray, hidden: np.ndarray, norm_pix: bool) -> float:
    total = 0.0
    for sample, patch in zip(*np.nonzero(hidden), strict=True):
        target = patches[sample, patch]
        if norm_pix:
            mean = sum(target) / len(target)
            variance = sum((value - mean) ** 2 for value in target) / (len(target) - 1)
            target = (target - mean) / math.sqrt(variance + 1e-6)
        total += sum((prediction[sample, patch] - target) ** 2) / len(target)
    return total


@pytest.mark.parametrize("norm_pix", [False, True])
def test_masked_reconstruction_sums_the_error_of_hidden_patches(norm_pix: bool) -> None:
    rng = np.random.default_rng(0)
    # A contrast this low makes the 1e-6 under the root count.
    prediction, patches = rng.normal(size=(3, 5, 12)), 1e-3 * rng.normal(size=(3, 5, 12))
    hidden = rng.random((3, 5)) < 0.6
    ours = masked_reconstruction(*map(torch.from_numpy, (prediction, patches, hidden)), norm_pix)
    assert ours.item() == pytest.approx(reconstruction_by_loop(prediction, patches, hidden, norm_pix), rel=1e-12)


def test_masked_reconstruction_of_one_flat_image_is_finite() -> None:
    prediction = torch.randn(1, 4, 12, requires_grad=True)
    hidden = torch.tensor([[True, False, True, True]])
    loss = masked_reconstruction(prediction, torch.ones(1, 4, 12), hidden, norm_pix=True)
    loss.backward()
    assert prediction.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(prediction.grad).all() and not prediction.grad[0, 1].any()
