"""Mixup and CutMix of one image with another: the pixels, the share, and what decides on them."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from mmpretrain.data.mixing import Mix
from mmpretrain.errors import UsageError
from mmpretrain.seeds import hash64


def image(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 12, 10), dtype=torch.uint8, generator=generator)


def mixed(mix: Mix, seed: int) -> tuple[Tensor, float]:
    picture = image(0)
    return picture, mix(picture, image(1), seed)


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.8, 0.0), (0.0, 1.0)])
def test_pixels_and_share_are_timms_for_the_same_draws(mixup_alpha: float, cutmix_alpha: float) -> None:
    """timm mixes image i of a batch with image b - i - 1."""
    theirs = Mixup(mixup_alpha, cutmix_alpha, mode="elem", label_smoothing=0.0, num_classes=2)
    for seed in range(20):
        ours, share = mixed(Mix(mixup_alpha, cutmix_alpha), seed)
        # timm draws the share, then whether to mix, then the rectangle; ours draws the rectangle after the share.
        np.random.seed(hash64(seed, "mix") % 2**32)  # noqa: NPY002
        kept = np.random.beta(mixup_alpha or cutmix_alpha, mixup_alpha or cutmix_alpha)  # noqa: NPY002
        theirs._params_per_elem = lambda n, kept=kept: (  # type: ignore[method-assign]
            np.array([kept, 1.0]),
            np.full(n, cutmix_alpha > 0),
        )
        batch, target = theirs(torch.stack([image(0), image(1)]).double(), torch.tensor([0, 1]))
        assert (ours.double() - batch[0]).abs().max() <= 0.5
        assert share == pytest.approx(float(target[0, 1]), abs=1e-6)


def test_the_seed_decides_and_nothing_else() -> None:
    mix = Mix()
    first, share = mixed(mix, 5)
    np.random.seed(3)  # noqa: NPY002
    again, same = mixed(Mix(), 5)
    assert torch.equal(first, again) and share == same
    assert not torch.equal(first, mixed(mix, 6)[0])


def test_as_many_are_mixed_and_cut_as_asked() -> None:
    mix = Mix(prob=0.3, switch_prob=0.25)
    chosen = [seed for seed in range(4000) if mix.is_mixed(seed)]
    assert len(chosen) / 4000 == pytest.approx(0.3, abs=0.03)
    cut = 0
    for seed in chosen:
        picture, share = mixed(mix, seed)
        assert 0 <= share <= 1
        cut += bool(((picture == image(0)) | (picture == image(1))).all())
    assert cut / len(chosen) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0"),
        ({"prob": 1.5}, "prob is 1.5"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "mixup_alpha and cutmix_alpha are 0; expected one above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mix(**arguments)
